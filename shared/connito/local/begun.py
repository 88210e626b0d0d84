"""The run that `connito up` has begun in its folder and not finished: what the next `connito up` there goes on with."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from connito.errors import ConnitoError, Invalid
from connito.files import write_durably
from connito.local.defaults import UpOptions
from connito.platform.datadir import DataDir
from connito.protocol.policy.choices import ADVERSARIES

if TYPE_CHECKING:
    from connito.wire.log import Log

# Of the call, not of the run.
_CALL = ("data_dir", "report", "new")
# What `connito up` calls a run, behind its domain: with a seed, or the time.
_ID = re.compile(r"-(?:s(?P<seed>\d+)|\d{8}-\d{6})(?:-\d+)?")


@dataclass(frozen=True)
class Begun:
    """A run and the options with which it was begun."""

    run: str
    options: UpOptions


_FORM = TypeAdapter(Begun)


def note(data: DataDir, run: str, options: UpOptions) -> None:
    """Say for later that a run is begun."""
    write_durably(_path(data), _FORM.dump_json(Begun(run, _of_run(options)), indent=1) + b"\n")


def find(data: DataDir) -> Begun | None:
    """Return the run that is begun and not finished. Raises `Invalid` when its file is not readable."""
    try:
        return _FORM.validate_json(_path(data).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise Invalid(
            f"{_path(data)}, which says how to go on with the run begun there, is damaged or of another version; start "
            "another run with `connito up --new`"
        ) from error


async def resume(given: UpOptions, data: DataDir) -> tuple[UpOptions, Begun | None]:
    """Return the options to go on with here, and the run that they are of; the given ones where none is begun.

    Where the file is damaged the log says which run it is. Call with the folder held and nothing running there. Raises `Invalid`.
    """
    if given.new:
        return given, None
    try:
        found = find(data)
    except Invalid:
        if not (data.root / "nats" / "jetstream").is_dir():
            raise
        found = await _in_log(given, data)
    return (given, None) if found is None else (options_to_go_on(given, found), found)


async def _in_log(given: UpOptions, data: DataDir) -> Begun | None:
    """Return the run that was begun here last and has no report yet, by the log that lies here."""
    from connito.bus import Bus
    from connito.platform.log import read_log
    from connito.platform.servers import NatsServer
    from connito.wire.identity import Identity
    from connito.wire.roster import Roster

    names = {}
    for path in data.keys.glob("*.nk"):
        with suppress(ConnitoError):
            names[Identity.load(path).public] = path.stem
    nats = NatsServer(data.root / "nats", log_file=data.logs / "nats-server.log")
    try:
        await asyncio.to_thread(nats.start)
        async with await Bus.connect(nats.url, None, "up") as bus:
            log = await read_log(bus, Roster.load(data.roster))
    finally:
        await asyncio.to_thread(nats.stop)
    return begun_in(log, names, given, _reported(data))


def begun_in(log: Log, names: dict[str, str], given: UpOptions, reported: str) -> Begun | None:
    """Return the run of the customer here that was begun last, unless it is the one `reported` on. `names` are those of the keys
    that lie here.

    What the log does not hold is taken from `given`. Raises `Invalid` where that names another base.
    """
    found = []
    for facts in log.runs.values():
        spec, created = facts.spec, facts.created_fact
        if spec is not None and created is not None and names.get(spec.customer) == "customer":
            made = _ID.fullmatch(spec.run.removeprefix(spec.domain))
            found += [(created.sequence, facts, spec, made)] if made is not None else []
    if not found:
        return None
    _, facts, spec, made = max(found, key=lambda one: one[0])
    if facts.ended is not None and spec.run == reported:
        return None
    base = spec.base.name if spec.base.name in ("demo", "tiny") else given.base
    if base == given.base and Path(base).name != spec.base.name:
        raise Invalid(
            f"run {spec.run} is unfinished here and was begun with a base in a folder called {spec.base.name}, of which nothing "
            "here says where it is; name it with --base to go on, or start another run with `connito up --new`"
        )
    acting = {names[key] for key in (*facts.enrolled, *facts.joined) if key in names}
    windows = spec.windows
    if len(facts.enrolled) < windows.min_miners or len(facts.joined) < windows.min_validators:
        acting = set(names.values())  # It was killed before all had come.
    most = _numbers(acting)
    options = UpOptions(
        cycles=spec.cycles,
        miners=max(1, most.get("miner", 0)),
        validators=max(1, most.get("validator", 0)),
        adversaries=tuple(kind for kind in ADVERSARIES for _ in range(most.get(kind, 0))),
        domain=spec.domain,
        base=base,
        seed=None if made["seed"] is None else int(made["seed"]),
        overrides=given.overrides,
    )
    return Begun(spec.run, _of_run(options))


def _numbers(names: Iterable[str]) -> dict[str, int]:
    """Return the highest number of each kind of participant, as in `miner-3`."""
    most: dict[str, int] = {}
    for name in names:
        kind, _, number = name.rpartition("-")
        if kind and number.isdecimal():
            most[kind] = max(most.get(kind, 0), int(number))
    return most


def _reported(data: DataDir) -> str:
    """Return the run that the report here is of."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(data.report.read_bytes())["run"])
    return ""


def forget(data: DataDir) -> None:
    """Say that the run has ended and its report is written."""
    _path(data).unlink(missing_ok=True)


def options_to_go_on(given: UpOptions, begun: Begun) -> UpOptions:
    """Return the options of the begun run. Raises `Invalid` naming those that were now given and differ."""
    plain, now, then = (vars(options) for options in (UpOptions(), _of_run(given), begun.options))
    differ = [
        f"--{'set' if name == 'overrides' else name} {_shown(now[name])}, not {_shown(then[name]) or 'none'}"
        for name in now
        if now[name] not in (plain[name], then[name])
    ]
    if differ:
        raise Invalid(
            f"run {begun.run} is unfinished here and was begun with other options ({'; '.join(differ)}); leave them out to "
            "go on with it, or cancel it and start another one with `connito up --new`"
        )
    return replace(begun.options, **{name: getattr(given, name) for name in _CALL})


def _of_run(options: UpOptions) -> UpOptions:
    base = options.base if options.base in ("demo", "tiny") else str(Path(options.base).absolute())
    return replace(options, base=base, data_dir=None, report=None, new=False)


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _path(data: DataDir) -> Path:
    return data.root / "begun.json"

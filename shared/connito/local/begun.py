"""The run that `connito up` has begun in its folder and not finished: what the next `connito up` there goes on with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from connito.errors import Invalid
from connito.files import write_durably
from connito.local.defaults import UpOptions
from connito.platform.datadir import DataDir

# Of the call, not of the run.
_CALL = ("data_dir", "report", "new")


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

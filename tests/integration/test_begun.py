"""`connito up` goes on with the run of its folder by the log that lies there, where the file that says which is damaged."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from connito.bus import Bus
from connito.errors import Invalid
from connito.local import begun
from connito.local.defaults import UpOptions, profile
from connito.local.display import PlainDisplay
from connito.local.identities import participants
from connito.local.installation import Installation
from connito.platform.datadir import DataDir
from connito.platform.servers import NatsServer
from connito.v1 import run_pb2

from tests.support.waiting import declared

BEGUN = UpOptions(base="tiny", miners=2, validators=1, adversaries=("copier",), seed=7, cycles=5, domain="code")
SEEDED, TIMED = "code-s7", "code-20260102-030405"


def installed(root: Path) -> Installation:
    data, made = DataDir.open(root), participants(2, 1, BEGUN.adversaries)
    data.logs.mkdir(exist_ok=True)
    return Installation(data, made, profile(BEGUN).machine(2), BEGUN.seed, PlainDisplay(io.StringIO()))


async def written(root: Path, *runs: str, ended: str = "", base: str = "tiny", customer: str = "") -> DataDir:
    """A folder as an `up` that was killed leaves it, with a damaged file."""
    made = installed(root)
    who = {name: member.identity for name, member in made.members.items()}
    nats = NatsServer(root / "nats", accounts=made.accounts)
    nats.start()
    try:
        async with await Bus.connect(nats.url, who["operator"], "up", made.roster) as bus:
            await declared(bus.js)
        async with await Bus.connect(nats.url, who["coordinator"], "coordinator", made.roster) as bus:
            for run in runs:
                spec = run_pb2.RunSpec(run=run, domain="code", cycles=5, customer=customer or who["customer"].public)
                spec.base.name, spec.windows.min_miners, spec.windows.min_validators = base, 3, 1
                assert await bus.publish_fact(run, "run", 0, "created", run_pb2.RunCreated(spec=spec))
            if ended:
                assert await bus.publish_fact(ended, "run", 0, "ended", run_pb2.RunEnded(run=ended))
    finally:
        nats.stop()
    (root / "begun.json").write_bytes(bytes(100))
    return made.data


@pytest.mark.parametrize("given", [UpOptions(), UpOptions(base="tiny", cycles=5, miners=2), UpOptions(domain="code")])
async def test_a_damaged_file_costs_no_run(tmp_path: Path, given: UpOptions) -> None:
    data = await written(tmp_path, "code-s6", SEEDED)
    options, found = await begun.resume(given, data)
    assert found == begun.Begun(SEEDED, BEGUN)
    assert options == BEGUN
    installed(tmp_path)  # With the same keys.


async def test_what_is_typed_and_differs_is_refused_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="--cycles 9, not 5"):
        await begun.resume(UpOptions(cycles=9), await written(tmp_path, TIMED))


async def test_a_run_that_ended_is_reported_on_once(tmp_path: Path) -> None:
    data = await written(tmp_path, SEEDED, ended=SEEDED)
    _, found = await begun.resume(UpOptions(), data)
    assert found is not None
    assert found.run == SEEDED
    data.report.write_text(f'{{"run": "{SEEDED}"}}')
    assert await begun.resume(UpOptions(), data) == (UpOptions(), None)


async def test_nobody_elses_run_is_taken(tmp_path: Path) -> None:
    data = await written(tmp_path, SEEDED, customer="UOTHER")
    assert await begun.resume(UpOptions(), data) == (UpOptions(), None)


async def test_a_base_that_lies_elsewhere_is_asked_for(tmp_path: Path) -> None:
    data = await written(tmp_path, TIMED, base="mine")
    with pytest.raises(Invalid, match="--base"):
        await begun.resume(UpOptions(), data)
    options, _ = await begun.resume(UpOptions(base="/models/mine"), data)
    assert (options.base, options.seed) == ("/models/mine", None)

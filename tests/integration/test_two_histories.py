"""An operator that shows one log to some and another to others, on real brokers, before witnesses and validators as processes.

The broker's folder is copied at a moment. What is said from then on is said twice, differently, and signed both times with the
operator's own keys. Which of the two somebody sees is what answers at their address.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import pytest
from connito.bus import Bus
from connito.platform.servers import NatsServer
from connito.v1 import cycle_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.integration.conftest import declare_streams
from tests.integration.tiny_run import Teller, telling
from tests.integration.witness import ServiceProcess
from tests.support.run import Run, ordered
from tests.support.waiting import until_logged

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

CUSTOMER = Identity.generate()
RUN = "shown-twice"


@dataclass
class Operator:
    """A broker, the operator's keys, and copies of the broker's folder."""

    server: NatsServer
    identities: dict[str, Identity]
    roster: Roster

    @asynccontextmanager
    async def speaking(self) -> AsyncIterator[Teller]:
        connect = partial(Bus.connect, self.server.url, name="test", roster=self.roster)
        async with (
            await connect(identity=self.identities["coordinator"]) as coordinator,
            await connect(identity=self.identities["committer"]) as committer,
            telling(RUN, {"coordinator": coordinator, "committer": committer}, self.roster) as teller,
        ):
            yield teller

    async def begin(self) -> None:
        async with self.speaking() as teller:
            await teller.say("run", 0, "created", ordered(Run(name=RUN).spec(), CUSTOMER))
        await self.go_on(1)

    async def go_on(self, *cycles: int, to: str = "") -> None:
        """Write the heads of cycles, and who is in them, which the head after it covers."""
        async with self.speaking() as teller:
            await teller.until(lambda facts: facts.spec, "the run")
            for cycle in cycles:
                await teller.open("train", cycle, [to] if to else [], ArtifactRef())

    def keep(self, name: str) -> None:
        """Copy what the broker has by now."""
        self.server.stop()
        shutil.copytree(self._folder, self._folder.with_name(name))
        self.server.start()

    def show(self, name: str) -> None:
        """Answer with a copy from now on, at the same address."""
        self.server.stop()
        shutil.rmtree(self._folder)
        shutil.copytree(self._folder.with_name(name), self._folder)
        self.server.start()

    def begin_anew(self) -> None:
        """Have no log any more."""
        self.server.stop()
        shutil.rmtree(self._folder)
        self.server.start()
        asyncio.run(declare_streams(self.server.url))

    @property
    def _folder(self) -> Path:
        return self.server.data_dir / "jetstream"


@pytest.fixture
def operator(own_nats: NatsServer, identities: dict[str, Identity], roster: Roster) -> Operator:
    return Operator(own_nats, identities, roster)


class Outsider:
    """`connito witness` as a process of its own."""

    def __init__(self, operator: Operator, home: Path) -> None:
        home.mkdir(exist_ok=True)
        Identity.generate().save(home / "me.nk")
        operator.roster.save(home / "roster.json")
        self.home, self.folder, self.said = home, home / "witness", home / "said"
        self._env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("CONNITO_")},
            "CONNITO_NATS_URL": operator.server.url,
            "CONNITO_KEY_FILE": str(home / "me.nk"),
            "CONNITO_ROSTER": str(home / "roster.json"),
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{RUN}.checkpoint"

    def command(self, *words: str) -> list[str]:
        return [str(Path(sys.executable).parent / "connito"), *words]

    def look(self) -> tuple[int, str]:
        """Look once."""
        return self._run("witness", "--folder", str(self.folder), "--once")

    def audit(self, checkpoint: Path) -> set[str]:
        """Whom an audit blames for what a checkpoint shows. These cycles are no whole ones, which is the operator's fault too."""
        code, said = self._run("audit", RUN, "--log-only", "--json", "--checkpoint", str(checkpoint))
        assert code == 6, said
        found = json.JSONDecoder().raw_decode(said)[0]["differences"]
        return {difference["by"] for difference in found if difference["check"] == "history"}

    def _run(self, *words: str) -> tuple[int, str]:
        done = subprocess.run(self.command(*words), env=self._env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def watch(self) -> Self:
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                self.command("witness", "--folder", str(self.folder)), env=self._env, stdout=said, stderr=said
            )
        return self

    def end(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


async def test_whoever_watches_refuses_another_history_and_keeps_the_proof(operator: Operator, tmp_path: Path) -> None:
    watching, late = Outsider(operator, tmp_path / "watching"), Outsider(operator, tmp_path / "late")
    await operator.begin()
    operator.keep("fork")
    watching.watch()
    try:
        await operator.go_on(2, 3, to="A")
        await until_logged(watching.said, "cosigned", times=3)
        kept = watching.checkpoint.read_text()
        operator.show("fork")
        await operator.go_on(2, 3, to="B")
        await operator.go_on(4, to="B")
        await until_logged(watching.said, "two histories")
    finally:
        code = watching.end()
    assert code == 6, watching.said.read_text()
    assert watching.checkpoint.read_text() == kept
    assert (watching.folder / f"{RUN}.refused").exists()
    # Who comes late sees one history only; what it keeps is held against what the other kept.
    assert late.look()[0] == 0
    assert late.audit(late.checkpoint) == set()
    assert late.audit(watching.checkpoint) == {"operator"}


async def test_who_refused_goes_on_refusing_whatever_is_shown_later(operator: Operator, tmp_path: Path) -> None:
    one = Outsider(operator, tmp_path / "one")
    await operator.begin()
    operator.keep("fork")
    await operator.go_on(2, 3, to="A")
    operator.keep("first")
    assert one.look()[0] == 0
    operator.show("fork")
    await operator.go_on(2, 3, to="B")
    code, said = one.look()
    assert (code, "two histories" in said) == (6, True), said
    proof = (one.folder / f"{RUN}.refused").read_text()
    operator.show("first")
    await operator.go_on(4)
    code, said = one.look()
    assert (code, "two histories" in said) == (6, True), said
    assert (one.folder / f"{RUN}.refused").read_text() == proof


async def test_a_log_that_was_begun_anew_is_another_history(operator: Operator, tmp_path: Path) -> None:
    """The same run under the same name and keys, shown to who is connected: it is read from its start again."""
    one = Outsider(operator, tmp_path / "one")
    await operator.begin()
    await operator.go_on(2, to="A")
    one.watch()
    try:
        await until_logged(one.said, "cosigned", times=2)
        await asyncio.to_thread(operator.begin_anew)
        await operator.begin()
        await until_logged(one.said, "two histories")
    finally:
        code = one.end()
    assert code == 6
    assert one.look()[0] == 6


async def test_a_mirror_that_is_behind_is_no_other_history(operator: Operator, tmp_path: Path) -> None:
    one = Outsider(operator, tmp_path / "one")
    await operator.begin()
    operator.keep("behind")
    await operator.go_on(2, to="A")
    operator.keep("whole")
    assert one.look()[0] == 0
    operator.show("behind")
    one.watch()
    try:
        await until_logged(one.said, "the log ends before the head that was cosigned; waiting for it")
        operator.show("whole")
        await operator.go_on(3, to="A")
        await until_logged(one.said, "cosigned", times=2)
    finally:
        code = one.end()
    assert code == 0, one.said.read_text()


async def test_two_witnesses_of_one_folder_are_not_shown_a_history_each(operator: Operator, tmp_path: Path) -> None:
    first, second = Outsider(operator, tmp_path / "one"), Outsider(operator, tmp_path / "two")
    second.folder = first.folder
    await operator.begin()
    first.watch()
    try:
        await until_logged(first.said, "cosigned")
        code, said = second.look()
        assert (code, "another witness remembers" in said) == (5, True), said
    finally:
        assert first.end() == 0


async def test_a_folder_of_another_platform_accuses_nobody(operator: Operator, tmp_path: Path) -> None:
    one = Outsider(operator, tmp_path / "one")
    await operator.begin()
    assert one.look()[0] == 0
    Roster({**operator.roster.keys, "coordinator": frozenset({Identity.generate().public})}).save(
        one.home / "roster.json"
    )
    code, said = one.look()
    assert (code, "of another platform" in said) == (3, True), said


class Judge:
    """A validator's process, whose disk outlives it."""

    def __init__(self, operator: Operator, home: Path) -> None:
        key = operator.identities["validator"]
        env = {"CONNITO_NATS_URL": operator.server.url, "CONNITO_STATE_DIR": str(home / "state")}
        # No file is asked for.
        env |= {"CONNITO_S3_ACCESS_KEY": "none", "CONNITO_S3_SECRET_KEY": "none"}
        self.me, self.process = key.public, ServiceProcess("validator", home, key, operator.roster, env)

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.process.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.process.kill()
        print(self.process.log.read_text()[-4000:])


async def test_a_validator_that_was_started_again_cosigns_no_other_history(operator: Operator, tmp_path: Path) -> None:
    """What it had read is thrown away, since another log answers; what it had signed is not."""
    judge = Judge(operator, tmp_path / "judge")
    await operator.begin()
    async with judge, operator.speaking() as teller:
        await teller.until(lambda facts: judge.me in facts.cosigned(1), "the first cosignature")
    operator.keep("fork")
    await operator.go_on(2, 3, to="A")
    async with judge, operator.speaking() as teller:
        await teller.until(lambda facts: judge.me in facts.cosigned(3), "the third cosignature")
    operator.show("fork")
    await operator.go_on(2, 3, to="B")
    async with judge, operator.speaking() as teller:
        facts = await teller.until(lambda facts: judge.me in facts.objections(3), "the objection")
        assert "cosigned a head over" in facts.objections(3)[judge.me].message.finding.text
        assert judge.me not in facts.cosigned(3)


async def test_a_validator_reveals_its_secret_in_one_history_alone(operator: Operator, tmp_path: Path) -> None:
    """The head before the cycle is the same in both, and so is the secret: known from the first, it would be no draw."""
    judge = Judge(operator, tmp_path / "judge")
    await operator.begin()
    async with judge, operator.speaking() as teller:
        await teller.until(lambda facts: judge.me in facts.seed_commitments(1), "the commitment")
        await teller.close("train", 1)
    operator.keep("fork")
    for history in "AB":
        async with judge, operator.speaking() as teller:
            await teller.until(lambda facts: facts.window("train", 1).closed, "the log")
            for window in ("commit", "submit"):
                await teller.open(window, 1, [], ArtifactRef())
                await teller.close(window, 1)
                made = [cycle_pb2.Submission(miner=f"of {history}")] if window == "submit" else []
                await teller.say(
                    window, 1, "settled", cycle_pb2.WindowSettled(run=RUN, cycle=1, submissions=made), role="committer"
                )
            await teller.open("validate", 1, [judge.me], ArtifactRef())
            acted = lambda facts: judge.me in {**facts.seed_reveals(1), **facts.objections(1)}  # noqa: E731
            facts = await teller.until(acted, "what it does")
            assert (judge.me in facts.seed_reveals(1)) == (history == "A")
        operator.show("fork")


async def test_a_validator_takes_no_part_while_a_head_stands_for_what_is_not_shown(
    operator: Operator, tmp_path: Path
) -> None:
    judge = Judge(operator, tmp_path / "judge")
    async with judge, operator.speaking() as teller:
        await teller.say("run", 0, "created", ordered(Run(name=RUN).spec(), CUSTOMER))
        await teller.until(lambda facts: judge.me in facts.validators, "the validator")
        head = await teller._head(1)
        head.cuts.add(stream="LIBRARY", last_sequence=1)
        await teller.say("run", 1, "head", head)
        opened = cycle_pb2.WindowOpened(run=RUN, cycle=1, window=cycle_pb2.WINDOW_TRAIN, expected=[judge.me])
        await teller.say("train", 1, "opened", opened)
        await until_logged(judge.process.log, "LIBRARY was read up to 0 of 1")
        assert judge.me not in teller.facts.seed_commitments(1)

"""The aggregator as a process: cycles told by hand up to their merge, with good, copied and harmful submissions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from connito.base.loading import load_full
from connito.bus import Bus
from connito.data.packing import pack
from connito.data.pseudo_gradients import DeltaFiles, gram_matrix
from connito.data.safetensors_header import SAFETENSORS
from connito.moe.resident import compress
from connito.moe.state import load_state, save_state
from connito.moe.training import train_local
from connito.platform.servers import NatsServer, ObjectStore
from connito.protocol.beacon import draw_seed, secret_digest
from connito.protocol.merging.candidates import Attempt, MergeInputs, write_candidate
from connito.store import ArtifactStore, key_of
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef
from connito.views.sentences import detail_of
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.integration.test_selector import store_env
from tests.integration.tiny_run import TARGET, Teller, TinyRun, corpus, prepare, telling, tiny_base
from tests.integration.witness import ServiceProcess
from tests.support.run import secret_of
from tests.support.waiting import until_logged

pytestmark = pytest.mark.integration

MINERS = {name: Identity.generate().public for name in ("anna", "bert", "copier", "wrecker")}


@dataclass
class Stage:
    """A run whose cycles are told by hand, and the aggregator beside it."""

    tiny: TinyRun
    teller: Teller
    store: ArtifactStore
    validators: list[Identity]
    folder: Path
    process: ServiceProcess
    env: dict[str, str]
    sequence: int = 0
    submissions: dict[int, list[cycle_pb2.Submission]] = field(default_factory=dict)

    @property
    def facts(self) -> RunFacts:
        return self.teller.facts

    async def begin(self) -> None:
        await self.teller.say("run", 0, "created", run_pb2.RunCreated(spec=self.tiny.spec))
        await self.teller.say("run", 0, "selected", self.tiny.selection, role="selector")
        for key in (validator.public for validator in self.validators):
            joined = run_pb2.ValidatorJoined(run=self.tiny.spec.run, validator=key)
            await self.teller.say("run", 0, "validator", joined, key, role=key)

    async def submit(self, cycle: int, name: str, state: dict[str, torch.Tensor]) -> None:
        """Settle the submissions of a cycle in the order in which they are given here."""
        path = self.folder / f"{cycle}-{name}.safetensors"
        save_state(state, path)
        self.sequence += 1
        entry = cycle_pb2.Submission(
            miner=MINERS[name],
            artifact=await self.store.put_file(path, SAFETENSORS, REALM_SUBMISSION),
            commit_sequence=self.sequence,
            reveal_sequence=self.sequence,
            origin_cycle=cycle,
            base_state=self.state(cycle),
        )
        self.submissions.setdefault(cycle, []).append(entry)

    def state(self, cycle: int) -> ArtifactRef:
        """θ_t of a cycle."""
        previous = self.facts.version(cycle - 1)
        return self.tiny.state if previous is None else previous.state

    async def tell(self, cycle: int, utilities: dict[str, float], *, merge: bool = True) -> None:
        """Tell a cycle from the opening of its train window to that of its merge window."""
        run, keys = self.tiny.spec.run, sorted(validator.public for validator in self.validators)
        secrets = {key: secret_of(key, cycle) for key in keys}
        await self.teller.open("train", cycle, keys, self.state(cycle))
        for key, secret in secrets.items():
            digest = secret_digest(run, cycle, key, secret)
            committed = cycle_pb2.SeedCommitted(run=run, cycle=cycle, validator=key, digest=digest)
            await self.teller.say("train", cycle, "seed", committed, key, role=key)
        await self.teller.close("train", cycle)
        for window in ("commit", "submit"):
            await self.teller.open(window, cycle, [], self.state(cycle))
            await self.teller.close(window, cycle, last=self.sequence)
        given = self.submissions.get(cycle, [])
        settled = cycle_pb2.WindowSettled(run=run, cycle=cycle, last_sequence=self.sequence, submissions=given)
        await self.teller.say("submit", cycle, "settled", settled, role="committer")
        await self.teller.open("validate", cycle, keys, self.state(cycle))
        for key, secret in secrets.items():
            revealed = cycle_pb2.SeedRevealed(run=run, cycle=cycle, validator=key, secret=secret)
            await self.teller.say("validate", cycle, "seed", revealed, key, role=key)
        if secrets:
            last = await self.teller.buses["coordinator"].last_sequence("VALIDATE")
            seed = draw_seed(run, cycle, secrets)
            drawn = cycle_pb2.SeedDrawn(run=run, cycle=cycle, seed=seed, validators=keys, last_sequence=last)
            await self.teller.say("validate", cycle, "drawn", drawn)
        for validator in self.validators:
            await self.report(cycle, validator, utilities)
        await self.teller.close("validate", cycle, "VALIDATE")
        if merge:
            await self.teller.open("merge", cycle, [], self.state(cycle))

    async def report(self, cycle: int, validator: Identity, utilities: dict[str, float]) -> None:
        report = cycle_pb2.ScoreReport(
            run=self.tiny.spec.run,
            cycle=cycle,
            validator=validator.public,
            seed=draw_seed(self.tiny.spec.run, cycle, {v.public: secret_of(v.public, cycle) for v in self.validators}),
            state_digest=self.state(cycle).digest,
        )
        for entry in self.submissions.get(cycle, []):
            name = next(name for name, key in MINERS.items() if key == entry.miner)
            score = report.scores.add(miner=entry.miner, artifact_digest=entry.artifact.digest)
            score.utility = utilities[name]
            if not score.utility:
                score.reason = reasons_pb2.REASON_NO_IMPROVEMENT
        await self.teller.say("validate", cycle, "report", report, validator.public, role=validator.public)

    async def version(self, cycle: int) -> cycle_pb2.VersionPublished:
        await self.teller.until(lambda facts: facts.version(cycle), f"version {cycle}", 240)
        version = self.facts.version(cycle)
        assert version is not None
        return version

    def verdicts(self, cycle: int) -> dict[str, cycle_pb2.Verdict]:
        scored = self.facts.scored(cycle)
        assert scored is not None
        names = {key: name for name, key in MINERS.items()}
        return {names[verdict.miner]: verdict for verdict in scored.verdicts}

    async def audit(self, cycle: int, utilities: dict[str, float], folder: Path) -> str:
        """The digest of a cycle's state, built once more out of nothing but the log and the store."""
        version, previous = self.facts.version(cycle), self.facts.version(cycle - 1)
        assert version is not None
        merged = sorted((e for e in self.submissions[cycle] if e.miner in version.merged), key=lambda e: e.miner)
        states = [await self.store.fetch(entry.artifact) for entry in merged]
        bases = [await self.store.fetch(entry.base_state) for entry in merged]
        names = {key: name for name, key in MINERS.items()}
        deltas = DeltaFiles(states, bases)
        ingredients = MergeInputs(
            await self.store.fetch(self.state(cycle)),
            None if previous is None else await self.store.fetch(previous.outer_state),
            merged,
            deltas,
            [utilities[names[entry.miner]] for entry in merged],
            [cycle - entry.origin_cycle for entry in merged],
            gram_matrix(deltas),
        )
        attempt = Attempt(version.gate, tuple(range(len(merged))))
        write_candidate(attempt, ingredients, self.tiny.spec.merging, folder / "state", folder / "momentum")
        state = await self.store.put_file(folder / "state", SAFETENSORS)
        momentum = await self.store.put_file(folder / "momentum", SAFETENSORS)
        assert momentum.digest == version.outer_state.digest
        return state.digest


@pytest.fixture
async def stage(
    own_nats: NatsServer,
    object_store: ObjectStore,
    store: ArtifactStore,
    tmp_path: Path,
    identities: dict[str, Identity],
    roster: Roster,
    run_id: str,
) -> AsyncIterator[Stage]:
    validators = [Identity.generate() for _ in range(3)]
    everyone = Roster({**roster.keys, "validator": frozenset(key.public for key in validators)})
    speakers = {role: identities[role] for role in ("coordinator", "selector", "committer")}
    speakers |= {key.public: key for key in validators}
    buses = {name: await Bus.connect(own_nats.url, key, "test", everyone) for name, key in speakers.items()}
    tiny = await prepare(store, run_id, tmp_path)
    tiny.spec.emission = 1000
    tiny.spec.windows.min_validators = 2
    tiny.spec.scoring.copy_threshold = 0.97
    tiny.spec.scoring.paid_ranks = 3
    tiny.spec.scoring.max_relative_norm = 100.0
    tiny.spec.merging.MergeFrom(
        run_pb2.MergePolicy(
            aggregator="utility-mean", outer_learning_rate=0.7, outer_momentum=0.9, gate_general_margin=0.05
        )
    )
    env = {"CONNITO_NATS_URL": own_nats.url, "CONNITO_TORCH_THREADS": "1", **store_env(object_store, store)}
    process = ServiceProcess("aggregator", tmp_path / "aggregator", identities["aggregator"], everyone, env)
    async with telling(run_id, buses, everyone) as teller:
        stage = Stage(tiny, teller, store, validators, tmp_path, process, env)
        await stage.begin()
        process.start()
        yield stage
    process.kill()
    for bus in buses.values():
        await bus.close()


def train(tiny: TinyRun, seed: int, theta: Path) -> dict[str, torch.Tensor]:
    """What an honest miner hands in."""
    from connito.moe.rows import write_rows

    torch.set_num_threads(1)
    model = load_full(tiny_base())
    write_rows(model, tiny.targets, load_state(theta))
    rows = pack(corpus(TARGET, 100 + seed, 40), 64)
    batches = rows[np.random.default_rng(seed).permutation(len(rows))[:32]].reshape(8, 4, -1)
    return train_local(compress(model, tiny.targets), batches, learning_rate=3e-3)[0]


async def work(stage: Stage, cycle: int, *names: str) -> None:
    """Submissions of honest miners, and of those that live off them, in the order of their commitments."""
    theta = await stage.store.fetch(stage.state(cycle))
    base = load_state(theta)
    generator = torch.Generator().manual_seed(cycle)
    for name in names:
        if name == "copier":
            noise = {k: 1e-5 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
            original = load_state(stage.folder / f"{cycle}-anna.safetensors")
            state = {key: rows + noise[key] for key, rows in original.items()}
        elif name == "wrecker":
            state = {key: rows + 2.0 * torch.randn(rows.shape, generator=generator) for key, rows in base.items()}
        else:
            seed = 10 * cycle + list(MINERS).index(name)
            state = await asyncio.to_thread(train, stage.tiny, seed, theta)
        await stage.submit(cycle, name, state)


async def test_good_work_is_merged_copies_and_wreckage_are_not(stage: Stage, tmp_path: Path) -> None:
    await work(stage, 1, "anna", "bert", "copier", "wrecker")
    utilities = {"anna": 0.3, "bert": 0.2, "copier": 0.31, "wrecker": 0.1}
    await stage.tell(1, utilities)
    version = await stage.version(1)

    verdicts = stage.verdicts(1)
    assert version.gate == cycle_pb2.GATE_DECISION_WITHOUT_OUTLIERS, detail_of(version)
    assert set(version.merged) == {MINERS["anna"], MINERS["bert"]}
    assert verdicts["copier"].reason == reasons_pb2.REASON_COPY
    assert MINERS["anna"][:12] in detail_of(verdicts["copier"])
    assert (verdicts["wrecker"].status, verdicts["wrecker"].reason) == (
        cycle_pb2.VERDICT_STATUS_SCORED,
        reasons_pb2.REASON_OUTLIER,
    )
    assert verdicts["anna"].reward > verdicts["bert"].reward > verdicts["wrecker"].reward > 0
    assert sum(verdict.reward for verdict in verdicts.values()) == 1000
    check_losses(version)
    assert await stage.audit(1, utilities, tmp_path) == version.state.digest

    await carry_on_after_a_kill(stage, version, tmp_path)


def check_losses(version: cycle_pb2.VersionPublished) -> None:
    """Target first, on two disjoint parts, both better than before."""
    for losses in (version.gate_losses, version.losses):
        assert losses[0].domain == TARGET
        assert losses[0].after < losses[0].before
        assert len(losses) == 2
    assert version.gate_losses[0].before != version.losses[0].before


async def carry_on_after_a_kill(stage: Stage, first: cycle_pb2.VersionPublished, tmp_path: Path) -> None:
    """The next cycle is merged by another process, from the log alone, with the momentum of the first."""
    stage.process.kill()
    await work(stage, 2, "anna", "bert")
    utilities = {"anna": 0.1, "bert": 0.2}
    await stage.tell(2, utilities)
    stage.process.start()
    version = await stage.version(2)

    assert (version.version, version.parent) == (2, 1)
    assert version.gate in (cycle_pb2.GATE_DECISION_ACCEPTED, cycle_pb2.GATE_DECISION_TOP_1), detail_of(version)
    await until_logged(stage.process.log, '"version": 2')
    assert version.losses[0].before == pytest.approx(first.losses[0].after, rel=1e-6)
    assert await stage.audit(2, utilities, tmp_path) == version.state.digest


async def test_a_cycle_that_only_does_harm_keeps_the_incumbent(stage: Stage) -> None:
    """Even when every validator was fooled."""
    await work(stage, 1, "wrecker")
    await stage.tell(1, {"wrecker": 0.4})
    version = await stage.version(1)

    assert version.gate == cycle_pb2.GATE_DECISION_KEPT_INCUMBENT
    assert version.state == stage.tiny.state
    assert stage.verdicts(1)["wrecker"].reason == reasons_pb2.REASON_GATE_REJECTED
    assert all(loss.before == loss.after for loss in version.losses)
    assert not any(rows.any() for rows in load_state(await stage.store.fetch(version.outer_state)).values())


async def test_without_quorum_and_without_work_the_run_goes_on(stage: Stage) -> None:
    await work(stage, 1, "wrecker")
    silent, stage.validators = stage.validators, []
    await stage.tell(1, {}, merge=False)
    await stage.teller.open("merge", 1, [], stage.tiny.state)
    version = await stage.version(1)
    assert version.gate == cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE
    assert stage.verdicts(1)["wrecker"].reason == reasons_pb2.REASON_NO_QUORUM

    stage.validators = silent
    await stage.tell(2, {})
    version = await stage.version(2)

    assert version.gate == cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE
    assert version.state == stage.tiny.state
    assert version.losses[0].before == version.losses[0].after > 0


async def test_a_submission_that_vanished_is_waited_for_and_costs_nobody(stage: Stage) -> None:
    """The store lost what the committer had accepted; it is put back, and nothing is restarted."""
    await work(stage, 1, "anna")
    artifact = stage.submissions[1][0].artifact
    data = (await stage.store.fetch(artifact)).read_bytes()
    await asyncio.to_thread(stage.store._client.remove_object, stage.store.bucket, key_of(artifact))
    await stage.tell(1, {"anna": 0.2})
    await until_logged(stage.process.log, '"waits_for": "object"')
    assert await stage.store.put_bytes(data, artifact.media_type, artifact.realm) == artifact
    version = await stage.version(1)

    assert list(version.merged) == [MINERS["anna"]]
    assert stage.verdicts(1)["anna"].reason == reasons_pb2.REASON_UNSPECIFIED


async def test_a_standby_takes_over(stage: Stage, identities: dict[str, Identity], tmp_path: Path) -> None:
    """Two replicas with one lease: the leader is killed with the merge ahead of it, the other one does it."""
    standby = ServiceProcess(
        "aggregator", tmp_path / "standby", identities["aggregator"], stage.teller.log.roster, stage.env
    )
    try:
        await until_logged(stage.process.log, '"leading"')
        standby.start()
        await until_logged(standby.log, "another replica leads")
        await work(stage, 1, "anna")
        stage.process.kill()
        await stage.tell(1, {"anna": 0.2})
        version = await stage.version(1)
        await until_logged(standby.log, "version published")
    finally:
        standby.kill()

    assert "version published" not in stage.process.log.read_text()
    assert list(version.merged) == [MINERS["anna"]]

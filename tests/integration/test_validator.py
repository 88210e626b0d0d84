"""A real validator process against a real broker and store; everybody else is played by hand."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.bus import Bus
from connito.data.corpus import Corpus
from connito.data.packing import pack
from connito.data.safetensors_header import SAFETENSORS
from connito.protocol.beacon import draw_seed, secret_digest
from connito.protocol.holdout import draw_sequences, subsets
from connito.protocol.policy.law import fill
from connito.store import ArtifactStore, key_of
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, REALM_SUBMISSION, ArtifactRef
from connito.wire.identity import Identity

from tests.integration.tiny_run import GENERAL, TARGET, Teller, TinyRun, prepare, telling, tiny_base
from tests.support.run import ordered
from tests.support.waiting import until_logged

CUSTOMER = Identity.generate()

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture
async def buses(bus_factory: Any, identities: dict[str, Identity]) -> dict[str, Bus]:
    return {
        role: await bus_factory(identities[role]) for role in ("coordinator", "selector", "committer", "aggregator")
    }


class Process:
    """A validator process that can be killed and started again."""

    def __init__(self, folder: Path, run: str, nats_url: str, store: ArtifactStore, key: Identity, roster: Any) -> None:
        key.save(folder / "key")
        roster.save(folder / "roster.json")
        self.log = folder / "validator.log"
        self.env = {
            **os.environ,
            "CONNITO_NATS_URL": nats_url,
            "CONNITO_KEY_FILE": str(folder / "key"),
            "CONNITO_ROSTER": str(folder / "roster.json"),
            "CONNITO_S3_ENDPOINT": store.endpoint,
            "CONNITO_S3_ACCESS_KEY": store._credentials.retrieve().access_key,
            "CONNITO_S3_SECRET_KEY": store._credentials.retrieve().secret_key,
            "CONNITO_S3_BUCKET": store.bucket,
            "CONNITO_CACHE_DIR": str(folder / "validator-cache"),
            "CONNITO_COMPUTE_DIR": str(folder / "compute"),
            "CONNITO_TORCH_THREADS": "1",
            "CONNITO_RUN": run,
        }
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log.open("a") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "services.validator", env=self.env, stderr=log, stdout=log
            )

    async def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.process.wait()


def make_states(tiny: TinyRun, folder: Path) -> dict[str, Path]:
    """θ_1, honest work on it, honest work on θ_0, and a state with a NaN, as files."""
    import torch
    from connito.base.loading import load_resident_local
    from connito.moe.resident import write_targets
    from connito.moe.state import load_state, save_state
    from connito.moe.training import train_local

    from tests.integration.tiny_run import corpus

    torch.set_num_threads(1)
    helpers = {layer.layer: list(layer.helpers) for layer in tiny.selection.layers}
    model = load_resident_local(tiny_base(), tiny.targets, helpers)

    def work(start: Path, seed: int, steps: int = 20) -> dict[str, torch.Tensor]:
        write_targets(model, load_state(start))
        rows = pack(corpus(TARGET, seed, 60), 64)
        batches = np.resize(rows, (steps, 4, rows.shape[1]))
        return train_local(model, batches, learning_rate=2e-3)[0]

    made = {"theta_1": work(tiny.theta, 31, steps=2)}
    save_state(made["theta_1"], folder / "theta_1")
    made["honest"] = work(folder / "theta_1", 32)
    made["late"] = work(tiny.theta, 33)
    made["nan"] = {name: tensor.clone() for name, tensor in made["theta_1"].items()}
    next(iter(made["nan"].values())).view(-1)[3] = float("nan")
    for name, state in made.items():
        save_state(state, folder / name)
    return {name: folder / name for name in made}


def losses_of_full_model(tiny: TinyRun, state: Any, sequences: np.ndarray) -> list[float]:
    """Sums of token negative log-likelihoods by plain forward passes of the full model, one for each document of a row."""
    import torch
    from connito.base.loading import load_full
    from connito.moe.rows import write_rows

    model = load_full(tiny_base())
    write_rows(model, tiny.targets, state)
    found = []
    for row in sequences:
        text, nll = row[row["position"] >= 0], 0.0
        for piece in np.split(text, np.flatnonzero(text["position"] == 0)[1:]):
            ids = torch.from_numpy(piece["token"].astype(np.int64))
            if len(ids) > 1:
                with torch.no_grad():
                    logits = model(input_ids=ids[None, :-1]).logits[0]
                each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
                nll += float(each[torch.from_numpy(piece["counts"][1:])].sum())
        found.append(nll)
    return found


async def put(store: ArtifactStore, path: Path) -> ArtifactRef:
    return await store.put_file(path, SAFETENSORS, REALM_SUBMISSION)


async def up_to_settled(
    teller: Teller, tiny: TinyRun, me: str, state: ArtifactRef, submissions: list[cycle_pb2.Submission]
) -> None:
    """From the train window, in which the validator commits its seed, to the settled submissions."""
    await teller.open("train", 1, [me], state)
    await teller.until(lambda facts: me in facts.seed_commitments(1), "the seed's commitment")
    await teller.close("train", 1)
    for window in ("commit", "submit"):
        await teller.open(window, 1, [], state)
        await teller.close(window, 1)
        settled = cycle_pb2.WindowSettled(
            run=teller.run, cycle=1, submissions=submissions if window == "submit" else []
        )
        await teller.say(window, 1, "settled", settled, role="committer")


async def test_a_cycle_is_scored_on_the_full_model_across_a_kill_9(
    nats_server: Any, store: ArtifactStore, buses: Any, identities: Any, roster: Any, run_id: str, tmp_path: Path
) -> None:
    key: Identity = identities["validator"]
    me, tiny = key.public, await prepare(store, run_id, tmp_path)
    states = await asyncio.to_thread(make_states, tiny, tmp_path)
    theta_1 = await store.put_file(states["theta_1"], SAFETENSORS, REALM_PUBLIC)
    artifacts = {
        "honest": (await put(store, states["honest"]), theta_1, 1),
        "late": (await put(store, states["late"]), tiny.state, 0),
        "freerider": (await put(store, states["theta_1"]), theta_1, 1),
        "nan": (await put(store, states["nan"]), theta_1, 1),
    }
    submissions = [
        cycle_pb2.Submission(
            miner=miner, artifact=artifact, base_state=origin, origin_cycle=cycle, commit_sequence=number
        )
        for number, (miner, (artifact, origin, cycle)) in enumerate(artifacts.items(), start=1)
    ]
    process = Process(tmp_path, run_id, nats_server.url, store, key, roster)
    await process.start()
    try:
        async with telling(run_id, buses, roster) as teller:
            await teller.say("run", 0, "created", ordered(tiny.spec, CUSTOMER))
            await teller.until(lambda facts: me in facts.validators, "the validator to join")
            await teller.say("run", 0, "selected", tiny.selection, role="selector")
            await up_to_settled(teller, tiny, me, theta_1, submissions)
            assert me not in teller.facts.seed_reveals(1)

            await process.end(signal.SIGKILL)
            await teller.open("validate", 1, [me], theta_1)
            await process.start()
            await teller.until(lambda facts: me in facts.seed_reveals(1), "the seed")
            secret = teller.facts.seed_reveals(1).get(me)
            committed = teller.facts.seed_commitment(1, me)
            assert secret is not None
            assert committed is not None
            assert secret_digest(run_id, 1, me, secret.message.secret) == committed.digest

            # What the committer accepted and the store lost is nobody's fault: it is waited for.
            lost = artifacts["honest"][0]
            await asyncio.to_thread(store._client.remove_object, store.bucket, key_of(lost))
            seed = draw_seed(run_id, 1, {me: secret.message.secret})
            drawn = cycle_pb2.SeedDrawn(run=run_id, cycle=1, seed=seed, validators=[me], last_sequence=secret.sequence)
            await teller.say("validate", 1, "drawn", drawn)
            await until_logged(process.log, '"waits_for": "object"')
            assert me not in teller.facts.reports(1)
            await store.put_file(states["honest"], lost.media_type, lost.realm)
            await teller.until(lambda facts: me in facts.reports(1), "the report")
            fact = teller.facts.reports(1).get(me)
            report = None if fact is None else fact.message
            assert report is not None
            await teller.say("run", 0, "ended", run_pb2.RunEnded(run=run_id))
            assert await process.end(signal.SIGTERM) == 0
    finally:
        await process.end(signal.SIGKILL)
    check_report(report, seed, theta_1)
    await check_receipt(report, seed, tiny, states, store)


def check_report(report: cycle_pb2.ScoreReport, seed: bytes, state: ArtifactRef) -> None:
    """Everybody has the verdict that fits."""
    scores = {score.miner: score for score in report.scores}
    assert (report.seed, report.state_digest) == (seed, state.digest)
    assert {miner: reasons_pb2.Reason.Name(score.reason) for miner, score in scores.items()} == {
        "honest": "REASON_UNSPECIFIED",
        "late": "REASON_UNSPECIFIED",
        "freerider": "REASON_UNCHANGED",
        "nan": "REASON_NON_FINITE",
    }
    assert scores["honest"].utility == scores["honest"].effect > scores["honest"].effect_low > 0
    assert scores["late"].utility > 0
    assert [scores[miner].utility for miner in ("freerider", "nan")] == [0, 0]


async def check_receipt(
    report: cycle_pb2.ScoreReport, seed: bytes, tiny: TinyRun, states: dict[str, Path], store: ArtifactStore
) -> None:
    """The losses are those of the drawn sequences under a plain forward pass of the full model."""
    from connito.moe.state import load_state

    scores = {score.miner: score for score in report.scores}
    loaded = {name: load_state(path) for name, path in states.items()}
    theta_0 = load_state(tiny.theta)
    late = {name: loaded["theta_1"][name] - (theta_0[name] - loaded["late"][name]) for name in theta_0}
    expected_counts = {TARGET: tiny.spec.scoring.target_sequences, GENERAL: tiny.spec.scoring.general_sequences}
    for reference in (tiny.spec.holdout, *tiny.spec.general_holdouts):
        sequences = pack(Corpus.load(await store.fetch(reference.artifact)), 64)
        pool = subsets(sequences, tiny.spec, reference.domain).score
        numbers = draw_sequences(seed, reference.domain, pool, expected_counts[reference.domain])
        rows = {miner: [x for x in score.losses if x.domain == reference.domain] for miner, score in scores.items()}
        for miner, state in (("honest", loaded["honest"]), ("late", late)):
            assert [row.sequence for row in rows[miner]] == numbers
            before = losses_of_full_model(tiny, loaded["theta_1"], sequences[numbers])
            after = losses_of_full_model(tiny, state, sequences[numbers])
            assert [row.before for row in rows[miner]] == pytest.approx(before, rel=1e-5)
            assert [row.after for row in rows[miner]] == pytest.approx(after, rel=1e-5)
            assert [row.tokens for row in rows[miner]] == sequences[numbers]["counts"].sum(axis=1).tolist()


async def test_a_false_draw_is_not_scored(
    nats_server: Any, store: ArtifactStore, buses: Any, identities: Any, roster: Any, run_id: str, tmp_path: Path
) -> None:
    key: Identity = identities["validator"]
    me, tiny = key.public, await prepare(store, run_id, tmp_path)
    process = Process(tmp_path, run_id, nats_server.url, store, key, roster)
    await process.start()
    try:
        async with telling(run_id, buses, roster) as teller:
            await teller.say("run", 0, "created", ordered(tiny.spec, CUSTOMER))
            await teller.until(lambda facts: me in facts.validators, "the validator to join")
            await teller.say("run", 0, "selected", tiny.selection, role="selector")
            await up_to_settled(teller, tiny, me, tiny.state, [])
            await teller.open("validate", 1, [me], tiny.state)
            await teller.until(lambda facts: me in facts.seed_reveals(1), "the seed")
            false = cycle_pb2.SeedDrawn(run=run_id, cycle=1, seed=b"\x07" * 32, validators=[me])
            await teller.say("validate", 1, "drawn", false)
            await until_logged(process.log, "the cycle breaks a rule, so it is not scored")
            # What the validator says after this shows that it goes on, without a report.
            await teller.close("validate", 1, "VALIDATE")
            await teller.say("merge", 1, "scored", cycle_pb2.CycleScored(run=run_id, cycle=1), role="aggregator")
            await teller.open("train", 2, [me], tiny.state)
            await teller.until(lambda facts: me in facts.seed_commitments(2), "the next cycle's seed")
            assert me not in teller.facts.reports(1)
            assert await process.end(signal.SIGTERM) == 0
    finally:
        await process.end(signal.SIGKILL)


async def test_a_run_whose_rules_nobody_asked_for_is_not_joined(
    nats_server: Any, store: ArtifactStore, buses: Any, identities: Any, roster: Any, run_id: str, tmp_path: Path
) -> None:
    key: Identity = identities["validator"]
    me, tiny = key.public, await prepare(store, run_id, tmp_path)
    process = Process(tmp_path, run_id, nats_server.url, store, key, roster)
    await process.start()
    try:
        async with telling(run_id, buses, roster) as teller:
            fill(tiny.spec)
            created = ordered(tiny.spec, CUSTOMER)
            created.spec.emission += 1
            await teller.say("run", 0, "created", created)
            facts = await teller.until(lambda facts: facts.paused, "the validator to say that it takes no part")
            assert [(one.key, one.action) for one in facts.paused] == [(me, f"{run_id}/0/join")]
            assert "emission is not what the customer asked for" in facts.paused[0].detail
            assert me not in facts.validators
            assert await process.end(signal.SIGTERM) == 0
    finally:
        await process.end(signal.SIGKILL)

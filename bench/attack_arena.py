"""Test bed for attacks: a tiny base, real local training, and the production path from an upload to a new version.

Everything that judges is the code that services run: the committer's look into a file, scoring on the full model by the
drawn sequences, the validators' reports, consensus, copies, rewards, candidates and the gate. Only the broker and the
store are left out; `bench/attack_messages.py` has those.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from connito.data.pseudo_gradients import DeltaFiles, gram_matrix
from connito.data.safetensors_header import SAFETENSORS
from connito.errors import Invalid
from connito.local.defaults import UpOptions, profile
from connito.protocol.findings import Refusal
from connito.protocol.holdout import subsets
from connito.protocol.merging.candidates import Attempt, MergeInputs, write_candidate
from connito.protocol.merging.cycle import Merged, merge_cycle
from connito.protocol.merging.opened import Files
from connito.protocol.policy import choices
from connito.protocol.scoring.counted_reports import read_reports
from connito.protocol.scoring.evaluation import Evaluation, score
from connito.protocol.scoring.verdicts import agree
from connito.store import ref_of_file
from connito.v1 import artifacts_pb2, cycle_pb2, reasons_pb2, run_pb2
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import FactKey

from bench.compose_setup import text
from bench.tiny_rig import LENGTH, Rig, Tokens, batched
from services.committer.content import check_artifact

if TYPE_CHECKING:
    import torch
    from connito.moe.selection import Selection
    from connito.workloads.gating import GateEvaluator
    from connito.workloads.scoring import SubmissionEvaluator
    from google.protobuf.message import Message

    State = dict[str, torch.Tensor]

RUN, TARGET = "attacks", "target"
# One domain for everybody, or one of two for each miner.
WORLDS = {"IID": ("recipes",), "non-IID": ("recipes", "logs")}
GENERAL = ("poems", "ledgers")
HONEST, EMISSION, EXPERTS_PER_LAYER = 4, 1_000_000, 3
TRAIN_SEED = 30_000

Lie = Callable[[cycle_pb2.ScoreReport], None]


@dataclass(frozen=True)
class Upload:
    """A miner's upload, in the order of commitment."""

    miner: str
    path: Path
    honest: bool = True


@dataclass
class Standing:
    """The state of a run before a cycle: state and outer momentum as files, the state before that, and earlier versions."""

    state: Path
    momentum: Path | None = None
    previous: Path | None = None
    versions: tuple[cycle_pb2.VersionPublished, ...] = ()

    def after(self, played: MergedCycle) -> Standing:
        """Return what a cycle leaves."""
        merged = played.merged
        return Standing(merged.state, merged.momentum, self.state, (*self.versions, merged.version))


@dataclass(frozen=True)
class MergedCycle:
    """A cycle that was merged. `refused` never reached a validator."""

    merged: Merged
    refused: Mapping[str, Refusal]

    @cached_property
    def verdicts(self) -> dict[str, cycle_pb2.Verdict]:
        """Return the deltas by miner."""
        return {verdict.miner: verdict for verdict in self.merged.scored.verdicts}

    def reason(self, miner: str) -> reasons_pb2.Reason.ValueType:
        """Return the reason a miner is told; 0 for work that is merged."""
        return self.refused[miner].reason if miner in self.refused else self.verdicts[miner].reason

    def reward(self, miner: str) -> int:
        """Return units earned."""
        return 0 if miner in self.refused else self.verdicts[miner].reward

    def loss(self, domain: str, side: str = "after") -> float:
        """Return the loss on the report subset, nats per token; of the general domains together for `general`."""
        wanted = [x for x in self.merged.version.losses if (x.domain == TARGET) == (domain == TARGET)]
        return float(np.mean([getattr(entry, side) for entry in wanted]))


@dataclass
class Arena:
    """One seed of one world. Honest work is done once per state and kept."""

    rig: Rig
    world: str
    folder: Path
    _work: dict[tuple[str, int, int], State] = field(default_factory=dict)

    @cached_property
    def spec(self) -> run_pb2.RunSpec:
        """Return the run's policy."""
        return self.policy()

    def policy(self) -> run_pb2.RunSpec:
        """Return the policy that `connito up --base tiny` takes, over this world's domains."""
        spec = profile(UpOptions(base="tiny", miners=HONEST).checked()).spec
        spec.run, spec.domain, spec.emission = RUN, TARGET, EMISSION
        spec.holdout.domain = TARGET
        # Uploads are written as what is judged; a code would but round them.
        spec.training.codec = choices.ROWS
        return spec

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the domains that the target consists of."""
        return WORLDS[self.world]

    @cached_property
    def selected(self) -> run_pb2.SelectionMade:
        """Return the selection as the log has it. It says nothing of use, and nobody claims where tokens went: so submissions
        are judged whole.
        """
        return run_pb2.SelectionMade(run=RUN)

    @cached_property
    def selection(self) -> Selection:
        """Return experts that the target uses most."""
        return self.rig.select(self.domains, EXPERTS_PER_LAYER)

    @cached_property
    def held(self) -> dict[str, Tokens]:
        """Return held-out sequences by domain, the target first."""
        target = np.concatenate([self.rig.held(domain, 96 // len(self.domains)) for domain in self.domains])
        return {TARGET: target, **{domain: self.rig.held(domain, 48) for domain in GENERAL}}

    @cached_property
    def _benches(self) -> tuple[SubmissionEvaluator, GateEvaluator]:
        from connito.moe.evaluate import Evaluator
        from connito.workloads.gating import GateEvaluator
        from connito.workloads.scoring import Holdout, SubmissionEvaluator

        parts = {domain: subsets(rows, self.spec, domain) for domain, rows in self.held.items()}
        holdouts = {domain: Holdout(rows, parts[domain].score) for domain, rows in self.held.items()}
        gate = {domain: rows[parts[domain].gate] for domain, rows in self.held.items()}
        report = {domain: rows[parts[domain].report] for domain, rows in self.held.items()}
        return (
            SubmissionEvaluator(Evaluator(self.rig.model(), self.selection), holdouts, self.spec, self.selected),
            GateEvaluator(Evaluator(self.rig.model(), self.selection), {"gate": gate, "report": report}),
        )

    @property
    def score_bench(self) -> SubmissionEvaluator:
        """Return the full model and hold-outs of a validator."""
        return self._benches[0]

    @cached_property
    def _training_model(self) -> Any:
        from connito.moe.resident import compress

        return compress(self.rig.model(), self.selection, self.selection.helpers)

    def start(self) -> Standing:
        """Return θ_0."""
        from connito.moe.evaluate import Evaluator
        from connito.moe.state import save_state

        path = self.folder / "start.safetensors"
        if not path.exists():
            save_state(Evaluator(self.rig.model(), self.selection).base, path, {"version": "0"})
        return Standing(path)

    def drawn(self, cycle: int) -> Tokens:
        """Return the target sequences that the beacon draws in a cycle."""
        numbers = self._benches[0].draw(_seed(self.rig.seed, cycle))[TARGET]
        return self.held[TARGET][numbers]

    def shard(self, miner: int, cycle: int, steps: int = 0) -> Tokens:
        """Return a miner's own text [H, B, L + 1]; of one domain where miners differ."""
        policy = self.spec.training
        domain = self.domains[miner % len(self.domains)]
        count = (steps or policy.local_steps) * policy.batch_sequences
        seed = TRAIN_SEED + 1000 * self.rig.seed + 50 * miner + cycle
        return batched(text(domain, count, seed, LENGTH), policy.batch_sequences)

    def train(self, state: Path, batches: Tokens, rate: float = 1.0) -> State:
        """Return the trainer's local steps, at `rate` times the policy's learning rate."""
        from connito.moe.resident import write_targets
        from connito.moe.state import load_state
        from connito.moe.training import train_local

        write_targets(self._training_model, load_state(state))
        policy = self.spec.training
        return train_local(
            self._training_model,
            batches,
            learning_rate=rate * policy.learning_rate,
            weight_decay=policy.weight_decay,
            inner=policy.optimizer,
        )[0]

    def sabotage(self, state: Path, good: Tokens, harmed: Tokens, rate: float = 4e-3, ceiling: float = 8.0) -> State:
        """Train down on the loss of `good` and up on that of `harmed`, both [H, B, L + 1], up to a ceiling of nats."""
        import torch
        from connito.moe.resident import read_targets, write_targets
        from connito.moe.state import load_state

        model = self._training_model
        write_targets(model, load_state(state))
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        for step, batch in enumerate(good):
            ups = model_loss(model, harmed[step % len(harmed)])
            loss = model_loss(model, batch) - torch.clamp(ups, max=ceiling)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return {name: rows.detach().clone() for name, rows in read_targets(model).items()}

    def honest(self, standing: Standing, cycle: int) -> list[State]:
        """Return the honest miners' results from a state."""
        digest = _digest(standing.state)
        for miner in range(HONEST):
            if (digest, cycle, miner) not in self._work:
                self._work[digest, cycle, miner] = self.train(standing.state, self.shard(miner, cycle))
        return [self._work[digest, cycle, miner] for miner in range(HONEST)]

    def play(
        self, cycle: int, standing: Standing, uploads: Sequence[Upload], validators: int, lies: Mapping[int, Lie]
    ) -> MergedCycle:
        """Return a cycle from its uploads to its version. The last validators tell the `lies`, by their number."""
        facts = self._facts(cycle, standing, validators)
        refused, settled, files = {}, [], {}
        for place, upload in enumerate(uploads):
            refusal = check_artifact(upload.path, _ref(upload.path), self.start().state, self.spec, self.selected)
            if refusal is not None:
                refused[upload.miner] = refusal
                continue
            settled.append(_submission(cycle, place + 1, upload, standing.state))
            files[upload.miner] = upload.path
        _put(facts, "submit", cycle, "settled", cycle_pb2.WindowSettled(run=RUN, cycle=cycle, submissions=settled))
        self._report(facts, cycle, standing, settled, files, validators, lies)
        agreed = agree(facts, cycle, read_reports(facts, cycle), settled, lambda _: 1.0)
        out = self.folder / f"merge-{len(list(self.folder.iterdir()))}"
        out.mkdir()
        inputs = Files(standing.state, standing.momentum, files, dict.fromkeys(files, standing.state))
        merged = merge_cycle(facts, cycle, settled, agreed, {}, inputs, self._benches[1].measure, out)
        return MergedCycle(merged, refused)

    def naive(self, standing: Standing, uploads: Sequence[Upload]) -> tuple[float, float]:
        """Return (target, general) loss when every file that loads is averaged and published: nothing is scored or
        gated.
        """
        readable = []
        for upload in uploads:
            try:
                DeltaFiles([upload.path], [standing.state])
                readable.append(upload)
            except Invalid:
                continue
        deltas = DeltaFiles([upload.path for upload in readable], [standing.state] * len(readable))
        entries = [_submission(1, place, upload, standing.state) for place, upload in enumerate(readable)]
        count = len(entries)
        with np.errstate(all="ignore"):
            gram = np.nan_to_num(gram_matrix(deltas))
        ingredients = MergeInputs(standing.state, None, entries, deltas, [1.0] * count, [0] * count, gram)
        policy = run_pb2.MergePolicy(aggregator="mean", outer_learning_rate=1.0)
        out = self.folder / "naive.safetensors"
        try:
            attempt = Attempt(cycle_pb2.GATE_DECISION_ACCEPTED, tuple(range(count)))
            write_candidate(attempt, ingredients, policy, out, self.folder / "naive-momentum.safetensors")
        except Invalid:
            return float("inf"), float("inf")
        found = self._benches[1].measure("report", _digest(out), out).per_token()
        return found[TARGET], float(np.mean([found[domain] for domain in GENERAL]))

    def _facts(self, cycle: int, standing: Standing, validators: int) -> RunFacts:
        facts = RunFacts(RUN)
        _put(facts, "run", 0, "created", run_pb2.RunCreated(spec=self.spec))
        _put(facts, "run", 0, "selected", self.selected)
        opened = cycle_pb2.WindowOpened(run=RUN, cycle=cycle, version=cycle - 1, state=_ref(standing.state))
        _put(facts, "train", cycle, "opened", opened)
        names = [_validator(number) for number in range(validators)]
        for version in standing.versions:
            _put(facts, "merge", version.cycle, "version", version)
        draw = cycle_pb2.SeedDrawn(run=RUN, cycle=cycle, seed=_seed(self.rig.seed, cycle), validators=names)
        _put(facts, "validate", cycle, "drawn", draw)
        return facts

    def _report(
        self,
        facts: RunFacts,
        cycle: int,
        standing: Standing,
        settled: Sequence[cycle_pb2.Submission],
        files: Mapping[str, Path],
        validators: int,
        lies: Mapping[int, Lie],
    ) -> None:
        from connito.workloads.scoring import SubmissionFiles

        bench, seed, stop = self._benches[0], _seed(self.rig.seed, cycle), threading.Event()
        drawn = bench.draw(seed)
        before = bench.incumbent(standing.state, drawn, stop)
        scores = []
        for entry in settled:
            found = SubmissionFiles(files[entry.miner], None)
            measurable = bench.submission(standing.state, found, drawn, before, stop, entry.miner)
            scores.append(score(entry, Evaluation(drawn, measurable, TARGET), self.spec))
        for number in range(validators):
            report = cycle_pb2.ScoreReport(run=RUN, cycle=cycle, validator=_validator(number), seed=seed, scores=scores)
            report.state_digest = _digest(standing.state)
            if number in lies:
                lies[number](report)
            _put(facts, "validate", cycle, "report", report, _validator(number))


def model_loss(model: Any, batch: Tokens) -> Any:
    """Return mean nats per token of sequences [B, L + 1], with its graph."""
    import torch

    ids = torch.from_numpy(batch.astype(np.int64))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def _validator(number: int) -> str:
    return f"V{number}"


def _seed(seed: int, cycle: int) -> bytes:
    return hashlib.sha256(f"attacks {seed} {cycle}".encode()).digest()


def _ref(path: Path) -> artifacts_pb2.ArtifactRef:
    return ref_of_file(path, SAFETENSORS, artifacts_pb2.REALM_SUBMISSION)


def _digest(path: Path) -> str:
    return _ref(path).digest


def _submission(cycle: int, place: int, upload: Upload, base: Path) -> cycle_pb2.Submission:
    return cycle_pb2.Submission(
        miner=upload.miner,
        artifact=_ref(upload.path),
        commit_sequence=place,
        reveal_sequence=100 + place,
        origin_cycle=cycle,
        base_state=_ref(base),
    )


def _put(facts: RunFacts, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> None:
    stream = "RUNS" if section == "run" else section.upper()
    facts.add(Fact(RUN, FactKey(section, cycle, kind, id_), message, "", stream, len(facts.facts) + 1, 0))

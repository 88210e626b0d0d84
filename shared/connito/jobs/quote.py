"""Estimate what a job will take: experts, bytes, memory, cycles and time, each with its source.

Experts and bytes are those that the selector will choose, by the same code on the same probe. Steps are not guessed: the
quote makes one cycle's local steps as one miner would, on the job's own text, and measures what they do to the hold-out.
Needs torch.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from connito.jobs.check import Checked
from connito.jobs.findings import Finding, listed, require
from connito.jobs.pilot import Pilot, try_out
from connito.moe.footprint import Footprint, Workload
from connito.protocol.coding import is_coded, usual_bytes
from connito.protocol.policy.choices import ADAMW
from connito.protocol.progress import MOST_REPLAY
from connito.render import formats
from connito.render.formats import count, duration, percent, size
from connito.runtime.progress import Progress, silent
from connito.views.run_report import window_seconds

if TYPE_CHECKING:
    from connito.jobs.context import JobContext
    from connito.moe.selection import Selection


@dataclass(repr=False)
class Quote:
    """`cycles_needed` is None where it cannot be told; `seconds` is for the job's cycles at most."""

    domain: str
    layers: dict[int, list[int]]
    total_experts: int
    upload: int
    model: int
    memory: Footprint
    cycles: int
    pilot: Pilot | None = None
    cycles_needed: int | None = None
    seconds: float | None = None
    seconds_from: str = ""
    emission: int = 0
    findings: list[Finding] = field(default_factory=list)

    def __repr__(self) -> str:
        memory, chosen = self.memory, sum(map(len, self.layers.values()))
        lines = [
            f"{self.domain}: {chosen} of {count(self.total_experts, 'expert')}, in {count(len(self.layers), 'layer')}",
            (
                f"  upload      {size(self.upload)} a miner and cycle ({percent(self.upload / self.model)} of the model), "
                f"{size(self.upload * self.cycles)} over {count(self.cycles, 'cycle')}"
            ),
            (
                f"  memory      {size(memory.total)} a miner: weights {size(memory.weights)}, training state "
                f"{size(memory.gradients + memory.moments)}, activations {size(memory.activations)}; and torch itself"
            ),
        ]
        if self.pilot is not None:
            pilot, trial = self.pilot, self.pilot.trials[-1]
            lines.append(
                f"  pilot       {count(pilot.steps, 'step')}: {trial.loss_before:.4f} → {trial.loss_after:.4f} nats per token "
                f"(saved {pilot.gain:.4f}, {trial.low:.4f} to {trial.high:.4f}; "
                f"{count(trial.sequences, 'sequence')}, {count(trial.tokens, 'token')})"
            )
        needed = f"about {self.cycles_needed} to the objective" if self.cycles_needed else "no estimate to an objective"
        lines.append(f"  cycles      at most {self.cycles}; {needed}")
        if self.seconds is not None:
            lines.append(
                f"  time        about {duration(self.seconds)} for {count(self.cycles, 'cycle')}, from {self.seconds_from}"
            )
        lines.append(f"  rewards     at most {count(self.emission, 'unit')}")
        return "\n".join([*lines, listed(self.findings)]).rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return the document that `connito job quote --json` prints."""
        return {
            "domain": self.domain,
            "experts": {"selected": sum(map(len, self.layers.values())), "total": self.total_experts},
            "layers": {str(layer): experts for layer, experts in sorted(self.layers.items())},
            "bytes": {
                "upload": self.upload,
                "upload_per_miner": self.upload * self.cycles,
                "model": self.model,
                "memory": self.memory.to_json(),
            },
            "cycles": {"at_most": self.cycles, "needed": self.cycles_needed},
            "seconds": {"at_most": self.seconds, "from": self.seconds_from},
            "pilot": None if self.pilot is None else self.pilot.to_json(),
            "rewards": {"at_most": self.emission},
            "findings": [finding.to_json() for finding in self.findings],
        }


def quote(checked: Checked, *, pilot: bool = True, progress: Progress = silent) -> Quote:
    """Price a checked job. Raises `Invalid` when the job has errors or nothing can be selected within its budget."""
    require(checked.findings)
    corpora, spec, context = checked.corpora, checked.spec, checked.context
    assert corpora is not None
    progress("routing the probe through the base", 0.1)
    selection = _select(checked)
    memory = _memory(checked, selection)
    trial = None
    if pilot:
        trial = try_out(checked, selection, progress)
    made = Quote(
        spec.domain,
        selection.layers,
        selection.total,
        _upload(checked, selection),
        context.manifest.size,
        memory,
        spec.cycles,
        trial,
    )
    made.cycles_needed = _cycles_needed(checked, trial)
    made.seconds, made.seconds_from = _duration(context, checked, trial)
    made.emission = spec.emission * spec.cycles
    coverage = (finding for finding in checked.findings if finding.check == "coverage")
    made.findings += [*coverage, *_retention(checked, trial), *_budget(checked, made)]
    progress("priced", 1.0)
    return made


def _upload(checked: Checked, selection: Selection) -> int:
    """Return the bytes of a submission: of the rows, or about those of what they are coded to."""
    manifest, policy = checked.context.manifest, checked.spec.training
    if not is_coded(policy):
        expert = manifest.expert_bytes()
        return sum(expert[layer] * len(experts) for layer, experts in selection.layers.items())
    chosen = [(layer, expert) for layer, experts in selection.layers.items() for expert in experts]
    return usual_bytes(policy, [row.shape for layer, expert in chosen for row in manifest.expert_rows(layer, expert)])


def _select(checked: Checked) -> Selection:
    """Select experts by the selector's own code on the same corpora."""
    from connito.v1.run_pb2 import RunSpec
    from connito.workloads.selecting import Probes, choose

    corpora, context, spec = checked.corpora, checked.context, RunSpec()
    assert corpora is not None
    spec.CopyFrom(checked.spec)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora.probe.save(folder / "probe")
        replay = None
        if corpora.replay is not None:
            spec.replay.domain = corpora.replay.domain
            replay = folder / "replay"
            corpora.replay.save(replay)
        probes = Probes(folder / "probe", replay)
        return choose(spec, context.manifest, context.files(), probes, folder / "theta").selection


def _memory(checked: Checked, selection: Selection) -> Footprint:
    """Predict a miner's memory as it is without any setting of its own."""
    from connito.workloads.rehearsal import rehearse

    policy = checked.spec.training
    work = Workload(
        policy.batch_sequences,
        policy.sequence_length,
        background=checked.spec.selection.background,
        routing_mode=policy.routing_mode or "natural",
        inner=policy.optimizer or ADAMW,
        packed=True,
    )
    return rehearse(checked.context.config(), selection.layers, selection.helpers, work)


def _cycles_needed(checked: Checked, pilot: Pilot | None) -> int | None:
    """Return the cycles until the objective, None where it cannot be told.

    Assumes that every cycle's gain has the ratio to the one before that earlier runs on this base show, 1 without them. That
    takes an objective that is in reach at this ratio, and a pilot that surely helped.
    """
    wanted = checked.job.objective.improvement
    if not wanted or pilot is None or pilot.low <= 0:
        return None
    return cycles_until(wanted, pilot.gain, decay(checked.context))


def cycles_until(wanted: float, first: float, ratio: float) -> int | None:
    """Return the least n with first·(1 + r + … + r^(n−1)) ≥ wanted; None if the sum never gets there."""
    if ratio >= 1:
        return math.ceil(wanted / first)
    if first / (1 - ratio) <= wanted:
        return None
    return max(1, math.ceil(math.log(1 - wanted * (1 - ratio) / first) / math.log(ratio)))


def decay(context: JobContext) -> float:
    """Return the median ratio of a cycle's gain to the one before, over runs on this base; never 0, or one
    cycle that gained nothing would mean that none ever will."""
    from connito.library.training_demand import decay as ratio_of
    from connito.library.training_demand import training_of

    found = [training for facts in context.history if (training := training_of(facts)) is not None]
    return max(0.05, ratio_of(found))


def _duration(context: JobContext, checked: Checked, pilot: Pilot | None) -> tuple[float | None, str]:
    """Return the seconds for all cycles, and their source: runs on this base, scaled by the steps, else the pilot's
    steps alone, which leaves validation out."""
    spec = checked.spec
    work = spec.training.local_steps * spec.training.batch_sequences * spec.training.sequence_length
    found: list[float] = []
    for facts in context.history:
        policy = None if facts.spec is None else facts.spec.training
        for cycle in facts.cycles() if policy is not None else ():
            seconds = window_seconds(facts, cycle)
            if len(seconds) == 5 and policy is not None:
                theirs = policy.local_steps * policy.batch_sequences * policy.sequence_length
                found.append(sum(seconds.values()) - seconds["train"] + seconds["train"] * work / max(1, theirs))
    if found:
        return median(
            found
        ) * spec.cycles, f"{formats.count(len(found), 'cycle')} that this platform has run on this base"
    if pilot is not None:
        return (
            pilot.seconds * spec.cycles,
            "the pilot's training steps on this machine; scoring and merging come on top",
        )
    return None, "nothing to go by: no run on this base, and no pilot"


def _retention(checked: Checked, pilot: Pilot | None) -> list[Finding]:
    """Say whether general text held in the pilot, and at which share of replay."""
    if pilot is None:
        return []
    margin, last = checked.spec.scoring.retention_margin, pilot.trials[-1]
    tried = ", ".join(
        f"{trial.replay:g}: {trial.general:+.4f} ({'holds' if trial.retained else 'forgets'})" for trial in pilot.trials
    )
    rests = f"on {formats.count(last.general_sequences, 'sequence')}, {formats.count(last.general_tokens, 'token')}"
    detail = f"change of general loss by share of replay {tried}, {rests}; {margin:g} nats per token are allowed"
    numbers = {"trials": [asdict(trial) for trial in pilot.trials], "margin": margin}
    if pilot.retained:
        note = (
            "" if checked.job.asked_replay is not None else f"the job will be submitted with replay: {pilot.replay:g}"
        )
        return [Finding("retention", "ok", detail, note, numbers)]
    remedy = "a run would refuse such work as retention-broken: lower policies.training.learning_rate" + (
        ", or raise `replay`" if pilot.replay < MOST_REPLAY else ""
    )
    return [Finding("retention", "warning", detail, remedy, numbers)]


def _budget(checked: Checked, made: Quote) -> list[Finding]:
    budget, found = checked.job.budget, list[Finding]()
    if budget.memory and made.memory.total > budget.memory:
        detail = f"a miner needs {formats.size(made.memory.total)}, budget.memory allows {formats.size(budget.memory)}"
        remedy = (
            "allow more, select fewer experts (budget.upload, policies.selection.max_experts), or shorten the batch"
        )
        numbers = {"memory": made.memory.total, "budget": budget.memory}
        found.append(Finding("budget", "error", detail, remedy, numbers))
    wanted, pilot = checked.job.objective.improvement, made.pilot
    if wanted and pilot is not None and pilot.low > 0 and (made.cycles_needed or math.inf) > made.cycles:
        reach = (
            "more cycles than there are" if made.cycles_needed is None else formats.count(made.cycles_needed, "cycle")
        )
        detail = (
            f"{wanted:g} nats per token would take {reach} "
            f"at the pilot's {pilot.gain:.4f} a cycle; the job has "
            f"{made.cycles}"
        )
        found.append(Finding("objective", "warning", detail, "allow more cycles, or ask for less"))
    if pilot is not None and pilot.low <= 0:
        detail = (
            f"the pilot of {formats.count(pilot.steps, 'step')} changes the "
            f"hold-out by {-pilot.gain:+.4f} nats per token, which may be chance"
        )
        remedy = (
            "raise policies.training.local_steps or learning_rate, or give more text; several miners together see more"
        )
        found.append(Finding("objective", "warning", detail, remedy))
    return found

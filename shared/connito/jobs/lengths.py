"""Choose a run's sequence length and batch from the text and the base, where the job leaves them open."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from connito.data.corpus import Corpus
from connito.errors import Invalid
from connito.jobs.context import JobContext
from connito.jobs.findings import Finding
from connito.jobs.spec import Job
from connito.moe.footprint import Workload
from connito.protocol.holdout import subsets
from connito.protocol.policy.choices import ADAMW
from connito.protocol.policy.profiles import PROFILES
from connito.protocol.sequences import sequences
from connito.render import formats
from connito.v1.run_pb2 import RunSpec

# Lengths are multiples of this, and at least as long.
STEP = 128
# This share of documents fits into a sequence whole, up to the longest that is chosen without being asked for.
WHOLE, LONGEST = 0.95, 4096
# Tokens of a local step, where there is as much text: with fewer, AdamW's steps are mostly noise.
TOKENS_PER_STEP = 4096
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


def fit_lengths(
    job: Job, spec: RunSpec, context: JobContext, train: Corpus, held: Mapping[str, Corpus]
) -> list[Finding]:
    """Write sequence length and batch into `spec`, unless the job or its profile says them, and say what bounds them.

    held: the held-out text by domain, the target's too; there must be enough sequences of it to score by.
    """
    sizes = np.diff(train.offsets)
    if len(sizes) == 0:
        return []
    policy, why = spec.training, ""
    if not _said(job, "sequence_length"):
        wanted = int(np.quantile(sizes, WHOLE, method="higher")) - 1
        length, why = _bounded(max(STEP, -(-wanted // STEP) * STEP), spec, context, held)
        policy.sequence_length = _in_memory(length, job, context, policy.optimizer or ADAMW)
        if policy.sequence_length < length:
            why = "of budget.memory"
    if not _said(job, "batch_sequences"):
        enough = len(train.tokens) // max(1, policy.local_steps)
        policy.batch_sequences = max(1, min(TOKENS_PER_STEP, enough) // policy.sequence_length)
    fits = float(np.mean(sizes <= policy.sequence_length + 1))
    detail = f"sequences of {policy.sequence_length} tokens, {policy.batch_sequences} in a step"
    detail += f"; {formats.percent(fits, 0)} of documents fit whole"
    if why:
        detail += f", no longer because {why}"
    numbers = {"sequence_length": policy.sequence_length, "batch_sequences": policy.batch_sequences, "fit_whole": fits}
    return [Finding("length", "ok", detail, "", numbers)]


def _said(job: Job, name: str) -> bool:
    camel = name.partition("_")[0] + name.partition("_")[2].capitalize()
    return bool({name, camel} & job.policies.get("training", {}).keys()) or f"training.{name}" in PROFILES[job.profile]


def _bounded(length: int, spec: RunSpec, context: JobContext, held: Mapping[str, Corpus]) -> tuple[int, str]:
    """Return the length within the bounds of the base and of the held-out text, and what bounds it."""
    why, positions = "", positions_of(context)
    if length > (most := min(LONGEST, positions or LONGEST)):
        why = (
            f"the base has {formats.count(positions, 'position')}"
            if most == positions
            else "longer ones have to be asked for"
        )
        length = max(STEP, most // STEP * STEP)
    while length > STEP and not _scores(length, spec, held):
        length, why = max(STEP, length // 2 // STEP * STEP), "of how much text is held out"
    return length, why


def _scores(length: int, spec: RunSpec, held: Mapping[str, Corpus]) -> bool:
    """Return whether there are enough held-out sequences of this length for all that is measured on them."""
    aim = RunSpec()
    aim.CopyFrom(spec)
    aim.holdout.domain, aim.training.sequence_length = spec.domain, length
    try:
        for domain, corpus in held.items():
            subsets(sequences(corpus, aim), aim, domain)
    except Invalid:
        return False
    return True


def _in_memory(length: int, job: Job, context: JobContext, inner: str) -> int:
    """Return the length with which one sequence at a time fits into the job's budget, with one expert a layer selected."""
    if length <= STEP or not job.budget.memory:
        return length
    from connito.workloads.predicting import predictor

    predict = predictor(context.config(), {layer: [0] for layer in context.manifest.expert_bytes()}, {})
    while length > STEP and predict(Workload(1, length, packed=True, inner=inner)).total > job.budget.memory:
        length = max(STEP, length // 2 // STEP * STEP)
    return length


def positions_of(context: JobContext) -> int:
    """Return how many positions the base was made for; 0 where its configuration does not say."""
    config = json.loads(context.file("config.json").read_bytes())
    for part in (config, config.get("text_config")):
        for name in _POSITIONS:
            if isinstance(part, dict) and isinstance(part.get(name), int) and part[name] > 0:
                return int(part[name])
    return 0

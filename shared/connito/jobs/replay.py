"""Choose the share of general text that a job mixes into its batches, where the job leaves it open.

The smallest share at which a pilot of this very job held is remembered, beside the bases of this machine; a job that no
pilot was made for begins with `SHARE`, and the run raises it by itself where that is too little.
"""

from __future__ import annotations

import hashlib
import json

from connito.base.recipes import cache_root
from connito.data.corpus import Corpus
from connito.files import write_durably
from connito.jobs.context import JobContext
from connito.jobs.findings import Finding
from connito.jobs.spec import Job
from connito.render import formats
from connito.v1.run_pb2 import RunSpec
from connito.wire.hashing import hash_fields

SHARE = 0.25


def settle(job: Job, spec: RunSpec, context: JobContext, train: Corpus, replay: Corpus | None) -> list[Finding]:
    """Write the share into `spec` where the job leaves it open, and say what it rests on."""
    if job.asked_replay is not None:
        return []
    if replay is None:
        spec.training.replay_share = 0
        return []
    known = recall(pilot_key(spec, context, train, replay))
    spec.training.replay_share = SHARE if known is None else known
    source = "the smallest that a pilot of this job held at" if known is not None else (
        "where a job says nothing; `connito job quote` finds the smallest that holds"
    )  # fmt: skip
    detail = f"{formats.percent(spec.training.replay_share, 0)} of each batch is general text, {source}"
    return [Finding("replay", "ok", detail, "", {"share": spec.training.replay_share, "tokens": len(replay.tokens)})]


def pilot_key(spec: RunSpec, context: JobContext, train: Corpus, replay: Corpus) -> str:
    """Return what decides a pilot's result, in one digest: base, texts, training but for the share, and what is allowed."""
    policy = RunSpec(training=spec.training, selection=spec.selection, scoring=spec.scoring)
    policy.training.ClearField("replay_share")
    texts = [hashlib.sha256(corpus.to_bytes()).hexdigest() for corpus in (train, replay)]
    fields = (context.manifest.digest, *texts, policy.SerializeToString(deterministic=True).hex())
    return hash_fields(b"connito.v1.job.pilot", *fields).hex()


def remember(key: str, share: float) -> None:
    """Keep the smallest share that held."""
    path = cache_root() / "pilots" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps({"replay_share": share}) + "\n")


def recall(key: str) -> float | None:
    """Return the share that `remember` was told; None where no pilot was made, or its file is not readable."""
    try:
        share = json.loads((cache_root() / "pilots" / f"{key}.json").read_bytes())["replay_share"]
        return float(share) if 0 <= float(share) < 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""Audit a run, or explain one submission, from where its log and store are to the outcome."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from connito.audit.access import check_tolerance, opened
from connito.audit.artifacts import Artifacts, Named
from connito.audit.audit import TOLERANCE, Audit, Options, against
from connito.audit.audit import audit as recompute
from connito.audit.evidence import Evidence
from connito.audit.receipts import Receipt, SubmissionId, find_miner, needs, receipt
from connito.audit.receipts import explain as recompute_submission
from connito.platform.datadir import DataDir, default_data_dir
from connito.runtime.progress import Notify, silent

T = TypeVar("T")


@dataclass(frozen=True)
class AuditOptions:
    """The location of a run, and options of its recomputation.

    folder: what an ended `connito up` left, whose servers are started for it; data_dir: the platform that runs here.
    model: also recompute what needs it; threads: for that, 0 all cores, None as many as `connito up` used in the folder;
    tolerance: nats per token by which losses may differ.
    """

    folder: Path | None = None
    data_dir: Path | None = None
    model: bool = True
    threads: int | None = None
    tolerance: float = TOLERANCE
    say: Notify = silent

    def recomputing(self) -> Options:
        """Return the part that says how to recompute."""
        return Options(self.model, self.threads_of_run(), self.tolerance, self.say)

    def threads_of_run(self) -> int:
        """Return how many threads to compute with: equal bits need as many as the run had."""
        if self.threads is not None:
            return self.threads
        if os.environ.get("CONNITO_NATS_URL") and self.folder is None and self.data_dir is None:
            return 0
        return DataDir((self.folder or self.data_dir or default_data_dir()).absolute()).threads


def audit(
    run: str, options: AuditOptions | None = None, windows: Mapping[str, str] | None = None
) -> tuple[Evidence, Audit]:
    """Recompute a run from its log and its artifacts. `windows`: the hash chain of somebody else's log, to compare with.

    Raises `NotFound` and `Retry` when log or store are not there, `Invalid` for a tolerance that is none.
    """
    options = options or AuditOptions()
    check_tolerance(options.tolerance)

    def work(evidence: Evidence, artifacts: Artifacts) -> Audit:
        audited = recompute(evidence, artifacts, options.recomputing())
        return against(audited, dict(windows)) if windows else audited

    return asyncio.run(_read_and(run, options, lambda evidence: lambda named: True, work))


def explain(submission: str, options: AuditOptions | None = None) -> tuple[Evidence, Receipt]:
    """Recompute what `<run>/<cycle>/<miner>` rests on. Raises as `audit`, and for a submission that is not there."""
    options = options or AuditOptions()
    check_tolerance(options.tolerance)
    wanted = SubmissionId.parse(submission)

    def choose(evidence: Evidence) -> Callable[[Named], bool]:
        receipt(evidence, wanted.cycle, find_miner(evidence, wanted))
        return lambda entry: needs(entry, wanted.cycle)

    def work(evidence: Evidence, artifacts: Artifacts) -> Receipt:
        miner = find_miner(evidence, wanted)
        return recompute_submission(evidence, artifacts, wanted.cycle, miner, options.recomputing())

    return asyncio.run(_read_and(wanted.run, options, choose, work))


async def _read_and(
    run: str,
    options: AuditOptions,
    choose: Callable[[Evidence], Callable[[Named], bool]],
    work: Callable[[Evidence, Artifacts], T],
) -> tuple[Evidence, T]:
    """Read the log of a run and the artifacts that `choose` wants for it, then do blocking work on them."""
    async with opened(options.folder, options.data_dir) as access:
        evidence = await access.evidence(run)
        wanted = choose(evidence)
        options.say(f"{len(evidence.records)} messages read")
        artifacts = await access.artifacts(evidence, wanted, options.say)
        return evidence, await asyncio.to_thread(work, evidence, artifacts)

"""Audit a run, or explain one submission, from where its log and store are to the outcome."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from connito.audit import chain
from connito.audit.access import Access, check_tolerance, opened
from connito.audit.archive import seal
from connito.audit.artifacts import Artifacts, Named, refused_reveals
from connito.audit.audit import TOLERANCE, Audit, Options, against
from connito.audit.audit import audit as recompute
from connito.audit.evidence import Evidence, Stored, read_stored
from connito.audit.receipts import Receipt, SubmissionId, find_miner, needs, receipt
from connito.audit.receipts import explain as recompute_submission
from connito.bus import streams
from connito.bus.streams import FACT_STREAMS
from connito.errors import Invalid, VerificationFailed
from connito.platform.datadir import DataDir, default_data_dir
from connito.platform.session import Session
from connito.render import formats
from connito.runtime.progress import Notify, silent
from connito.runtime.tasks import blocking
from connito.store.cache import digest_of_file
from connito.store.named import key_of
from connito.v1 import run_pb2

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
    # By where they come from: checkpoints of witnesses and receipts of miners, which the log has to agree with.
    kept: Mapping[str, str] = field(default_factory=dict)
    # Also the artifacts; without them a key that may read the log is enough.
    files: bool = True

    def recomputing(self) -> Options:
        """Return the part that says how to recompute."""
        return Options(self.model, self.threads_of_run(), self.tolerance, self.say, self.kept, self.files)

    def threads_of_run(self) -> int:
        """Return how many threads to compute with: equal bits need as many as the run had."""
        if self.threads is not None:
            return self.threads
        if os.environ.get("CONNITO_NATS_URL") and self.folder is None and self.data_dir is None:
            return 0
        return DataDir((self.folder or self.data_dir or default_data_dir()).absolute()).threads


@dataclass(frozen=True)
class Sealed:
    """An archive that was read and found whole. `head`: one hash over the messages, as an audit prints it."""

    run: str
    path: Path
    digest: str
    bytes: int
    messages: int
    objects: int
    head: str


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

    return blocking(_read_and(run, options, lambda evidence: lambda named: True, work))


def explain(submission: str, options: AuditOptions | None = None) -> tuple[Evidence, Receipt]:
    """Recompute what `<run>/<cycle>/<miner>` rests on: without credentials for the store, as far as the log goes.

    Raises as `audit`, and for a submission that is not there.
    """
    options = options or AuditOptions()
    check_tolerance(options.tolerance)
    if options.files and options.folder is None and not _has_store(options.data_dir):
        options.say("without keys of the store, what the log says is recomputed, and no file")
        options = replace(options, files=False, model=False)
    wanted = SubmissionId.parse(submission)

    def choose(evidence: Evidence) -> Callable[[Named], bool]:
        receipt(evidence, wanted.cycle, find_miner(evidence, wanted))
        return lambda entry: needs(entry, wanted.cycle)

    def work(evidence: Evidence, artifacts: Artifacts) -> Receipt:
        miner = find_miner(evidence, wanted)
        return recompute_submission(evidence, artifacts, wanted.cycle, miner, options.recomputing())

    return blocking(_read_and(wanted.run, options, choose, work))


def _has_store(data_dir: Path | None) -> bool:
    return Session.open(data_dir, role="customer", wake=True).has_store


async def _read_and(
    run: str,
    options: AuditOptions,
    choose: Callable[[Evidence], Callable[[Named], bool]],
    work: Callable[[Evidence, Artifacts], T],
) -> tuple[Evidence, T]:
    """Read the log of a run and the artifacts that `choose` wants for it, then do blocking work on them."""
    async with opened(options.folder, options.data_dir, files=options.files) as access:
        evidence = await access.evidence(run)
        wanted = choose(evidence)
        options.say(f"{formats.count(len(evidence.records), 'message')} read")
        artifacts = await access.artifacts(evidence, wanted, options.say) if options.files else Artifacts()
        return evidence, await asyncio.to_thread(work, evidence, artifacts)


def archive(run: str, path: Path, options: AuditOptions | None = None) -> Sealed:
    """Write a run, with everything that an audit of it needs, into one file; `connito audit --from` reads it. Where the file is
    there already, it is read, and nothing is written.

    Read back before it is called done. Raises `NotFound` and `Retry` when log or store are not there, `Invalid` for a run that
    goes on and for a file that cannot be written, `VerificationFailed` when artifacts are missing or damaged.
    """
    options = options or AuditOptions()
    if not path.exists():
        blocking(_seal(run, path, options))
    return blocking(_checked(run, path, options.say))


async def _seal(run: str, path: Path, options: AuditOptions) -> None:
    async with opened(options.folder, options.data_dir) as access:
        if not isinstance(access, Access):
            raise Invalid(f"{options.folder} is an archive already")
        stored = await access.stored(run)
        evidence = read_stored(run, stored, access.roster)
        if evidence.facts.ended is None:
            raise Invalid(f"run {run} goes on; it can be archived when it has ended")
        if (gone := evidence.facts.archived) is not None:
            raise Invalid(f"run {run} is in an archive already, with SHA-256 {gone.digest}; its windows were released")
        artifacts = await access.artifacts(evidence, lambda named: True, options.say)
        _refuse_faults(run, artifacts)
        named = [*artifacts.named, *refused_reveals(evidence)]
        objects = {
            key_of(one.ref): artifacts.paths[one.ref.digest] for one in named if one.ref.digest in artifacts.paths
        }
        await asyncio.to_thread(seal, path, run, stored, access.roster, objects, options.say)


async def _checked(run: str, path: Path, say: Notify) -> Sealed:
    async with opened(path, None) as archive:
        evidence = await archive.evidence(run)
        artifacts = await archive.artifacts(evidence, lambda named: True, say)
    _refuse_faults(str(path), artifacts)
    digest, size = await asyncio.to_thread(digest_of_file, path)
    head = chain.head(chain.windows_of(evidence.records))
    return Sealed(run, path, digest, size, len(evidence.records), len(artifacts.paths), head)


def _refuse_faults(what: str, artifacts: Artifacts) -> None:
    if faults := artifacts.step().differences:
        first = f"{faults[0].where}: {faults[0].what}"
        raise VerificationFailed(
            f"missing or damaged: {formats.count(len(faults), 'artifact')} of {what}, first {first}"
        )


def release(sealed: Sealed, data_dir: Path | None = None) -> None:
    """Say in the log which file holds the run, and drop its windows from the streams; safe to repeat. For the operator.

    Raises `Invalid` when the log names another file, or holds other messages than the archive.
    """
    blocking(_release(sealed, Session.open(data_dir, role="operator")))


async def _release(sealed: Sealed, session: Session) -> None:
    async with session.bus() as bus:
        records = [record async for record in bus.stored((*FACT_STREAMS, "INGRESS"), sealed.run)]
        said = read_stored(sealed.run, Stored(records, [], []), session.roster).facts.archived
        if said is None:
            if chain.head(chain.windows_of(records)) != sealed.head:
                raise Invalid(f"{sealed.path} is not what the log holds of {sealed.run}; write its archive anew")
            fact = run_pb2.RunArchived(
                run=sealed.run, digest=sealed.digest, bytes=sealed.bytes, messages=sealed.messages, head=sealed.head
            )
            await bus.publish_fact(sealed.run, "library", 0, "archived", fact)
        elif said.digest != sealed.digest:
            raise Invalid(f"the log names another archive of {sealed.run}, with SHA-256 {said.digest}")
        await streams.release(bus.js, sealed.run)

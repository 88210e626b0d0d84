"""The context of a job: the base model that it names and, where one runs, the platform.

A job can be checked without a platform when the base is on this machine. With one, the base may be any that a run used,
and the domains of earlier runs are there to measure forgetting on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.data.corpus import Corpus
from connito.data.encoding import encoder_of
from connito.data.manifest import Manifest
from connito.errors import Invalid, NotFound
from connito.jobs.spec import Job
from connito.library.governance import Viewer
from connito.library.schema import ExpertRecord, read_record
from connito.library.start import notices
from connito.platform.session import Session
from connito.protocol.entitlement import free_base_name
from connito.runtime.progress import Progress, silent
from connito.runtime.tasks import blocking
from connito.service.customer_store import CustomerStore
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.run_pb2 import CorpusRef, ExpertDeposited, RunSpec
from connito.wire.private import is_public
from connito.wire.sealing import unsealed

if TYPE_CHECKING:
    from connito.wire.facts import RunFacts
    from connito.wire.log import Log

NAMED = ("demo", "tiny")
# Of general text that comes with a base, as much as a job replays; the selector routes all of it.
REPLAY_TOKENS = 32_768
_TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens")


@dataclass
class JobContext:
    """Base and platform of a job.

    `domain` is the job's. `folder` is set where the base is a folder of this machine, `manifest_ref` where the platform has
    it; at least one is. `general` are the general hold-outs of the customer's earlier runs on this base, `history` all runs on
    it that it may see, newest first. `run` is one that entitles to the base, and `sources` those that entitle to the general
    texts, by digest. `replayed` is the general text that a run on the base replays, and anybody may read. `lender` is the run
    of another customer that the base is from. `taken` is the spec of an existing
    run of the job's id.
    """

    name: str
    manifest: Manifest
    folder: Path | None = None
    manifest_ref: ArtifactRef | None = None
    session: Session | None = None
    general: list[CorpusRef] = field(default_factory=list)
    history: list[RunFacts] = field(default_factory=list)
    lender: str = ""
    run: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    taken: RunSpec | None = None
    # Every run that the log holds.
    runs: Mapping[str, RunFacts] | None = None
    replayed: CorpusRef | None = None
    # Each expert that the platform's library was given, by its id.
    experts: dict[str, ExpertDeposited] = field(default_factory=dict)
    # What its library says against experts and sources of data, by subject.
    against: dict[str, str] = field(default_factory=dict)
    domain: str = ""
    progress: Progress = silent
    _files: dict[str, Path] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """Return one file of the base, fetched where it is not here. Raises `Retry` while the store is away."""
        if self.folder is not None:
            return self.folder / name
        if name not in self._files:
            self._files[name] = self.fetch(self.manifest.files[name].ref)
        return self._files[name]

    def files(self) -> dict[str, Path]:
        """Return every file of the base, by name."""
        return {name: self.file(name) for name in self.manifest.files}

    def config(self) -> Any:
        """Return the model's configuration, with the type its weights are loaded in. Imports torch."""
        from connito.base.description import describe_files
        from connito.data.checkpoint_files import find_checkpoint

        return describe_files(find_checkpoint(self.files())).plan()

    def fetch(self, ref: ArtifactRef) -> Path:
        """Fetch an artifact of the platform."""
        if self.session is None:
            raise NotFound("there is no platform to fetch from; start one with `connito up --no-wait`")
        return blocking(CustomerStore(self.session).fetch(ref, self.sources.get(ref.digest, self.run)))

    def record_of(self, expert: str) -> ExpertRecord | None:
        """Return the record of a library expert; None for one that is not there, or not for this customer."""
        if self.session is None or (said := self.experts.get(expert)) is None:
            return None
        try:
            file = blocking(CustomerStore(self.session).fetch(said.record, said.run))
            record = read_record(file.read_bytes(), expert)
        except (Invalid, NotFound):
            return None
        return record if Viewer(self.session.identity.public).sees(record) else None

    @cached_property
    def tokenizer(self) -> Any:
        """Return the base's tokenizer."""
        from connito.base.loading import load_tokenizer

        small = [name for name in self.manifest.files if not name.endswith(".safetensors")]
        return load_tokenizer({name: self.file(name) for name in small})

    @cached_property
    def tokenizer_digest(self) -> str:
        """Return digest of the tokenizer, as a corpus records it."""
        from connito.data.prepare import tokenizer_digest

        return tokenizer_digest(self.file(name) for name in self.manifest.files if name.startswith(_TOKENIZER[:2]))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        return encoder_of(self.tokenizer).encode(texts)

    @cached_property
    def shipped(self) -> Path | None:
        """Return the folder of the corpora that come with a named base, made where it is missing; None for another base."""
        from connito.base.corpora import Plan, build_corpora
        from connito.base.recipes import cached_base, cached_manifest

        for name in NAMED:
            folder = cached_base(name)
            if folder.is_dir() and cached_manifest(name).is_known_as(name, self.manifest.digest):
                plan = Plan.of(folder / "model", self.manifest.digest, tiny=name == "tiny")
                return build_corpora(plan, self.progress)
        return None

    def _shipped(self, part: str) -> dict[str, Path]:
        files = [] if self.shipped is None else sorted(self.shipped.glob(f"*.{part}.safetensors"))
        named = {file.name.partition(".")[0]: file for file in files}
        return {domain: file for domain, file in named.items() if domain != self.domain}

    def general_domains(self) -> list[str]:
        """Return the domains that forgetting is measured on where the job brings no general text."""
        return sorted({*self._shipped("holdout"), *(ref.domain for ref in self.general)})

    def general_corpora(self) -> Mapping[str, Corpus]:
        """Return the hold-outs of `general_domains`: of the customer's earlier runs, else those that come with the base."""
        shipped = {domain: Corpus.load(file) for domain, file in self._shipped("holdout").items()}
        return shipped | {ref.domain: self.corpus(ref) for ref in self.general}

    def replay_corpus(self) -> Corpus | None:
        """Return general text to replay: what comes with the base, else what an earlier run of it replayed; None without."""
        from connito.base.corpora import mixed

        if files := self._shipped("train"):
            return mixed({domain: Corpus.load(file) for domain, file in files.items()}, REPLAY_TOKENS)
        return None if self.replayed is None else Corpus.load(self.fetch(self.replayed.artifact))

    def corpus(self, ref: CorpusRef) -> Corpus:
        """Return a corpus of the customer's own from the platform, opened where it is sealed."""
        return Corpus.load(self.sealed(ref.artifact))

    def sealed(self, ref: ArtifactRef) -> Path:
        """Return a file of the customer's own from the platform, opened where it is sealed."""
        path = self.fetch(ref)
        assert self.session is not None, "it was fetched from there"
        me = self.session.identity
        return unsealed(path, ref, me, me.public)


def open_context(job: Job, root: Path, data_dir: Path | None, progress: Progress = silent) -> JobContext:
    """Find the base that the job names: among the customer's runs, on this machine, then among other public runs. Imports
    torch only where a base has to be built. Raises `NotFound` naming these places when it is in none."""
    session = _session(data_dir)
    if session is None:
        context = _from_machine(job, root, progress)
        context.domain, context.progress = job.domain, progress
        return context
    log = blocking(_read(session))
    found = _from_platform(job, root, session, log)
    context = found or _from_machine(job, root, progress)
    if found is None:
        me, digest = session.identity.public, context.manifest.digest
        context.session, context.name = session, free_base_name(context.name, digest, me, log.runs.values())
    context.domain, context.progress = job.domain, progress
    deposited = [fact for facts in log.runs.values() for fact in facts.deposits.values()]
    context.experts = {fact.message.expert_id: fact.message for fact in deposited}
    context.against = notices(fact for facts in log.runs.values() for fact in facts.notices.values())
    context.runs = log.runs
    if job.run in log.runs:
        context.taken = log.runs[job.run].spec
    return context


def _from_machine(job: Job, root: Path, progress: Progress) -> JobContext:
    folder = _folder(job.base, root, progress)
    manifest = _manifest(job.base, folder, progress)
    return JobContext(manifest.name, manifest, folder=folder)


def _session(data_dir: Path | None) -> Session | None:
    try:
        return Session.open(data_dir, role="customer")
    except NotFound:
        return None


async def _read(session: Session) -> Log:
    from connito.platform.log import read_log

    async with session.bus() as bus:
        return await read_log(bus, session.roster)


def _from_platform(job: Job, root: Path, session: Session, log: Log) -> JobContext | None:
    """Return the base that the job names, by name or by its manifest's digest, and the general domains of one's own runs.

    One's own runs say first what a name means, then this machine, and only then what another customer's run, the first that
    had the name and is public, has called so.
    """
    me = session.identity.public
    created = sorted((fact.sequence, facts) for facts in log.runs.values() if (fact := facts.created_fact))
    seen = [facts for _, facts in created if _is_seen(facts.require_spec(), me)]
    runs = [facts for facts in seen if job.base in (facts.require_spec().base.name, _manifest_digest(facts))]
    own = [facts for facts in runs if facts.require_spec().customer == me]
    if not runs or (not own and _is_here(job.base, root)):
        return None
    chosen = (own[-1] if own else runs[0]).require_spec()
    ref = chosen.base.manifest
    same = [facts for facts in reversed(seen) if _manifest_digest(facts) == ref.digest]
    general: dict[str, CorpusRef] = {}
    sources: dict[str, str] = {}
    for spec in (facts.require_spec() for facts in same):
        for corpus in (spec.holdout, *spec.general_holdouts) if spec.customer == me else ():
            if corpus.domain != job.domain:
                sources.setdefault(general.setdefault(corpus.domain, corpus).artifact.digest, spec.run)
    replays = [spec for facts in same if (spec := facts.require_spec()).replay.artifact.digest]
    if replays:
        sources.setdefault(replays[0].replay.artifact.digest, replays[0].run)
    ordered = [general[domain] for domain in sorted(general)]
    manifest = Manifest.load(blocking(CustomerStore(session).fetch(ref, chosen.run)))
    lender = "" if own else chosen.run
    return JobContext(
        chosen.base.name,
        manifest,
        manifest_ref=ref,
        session=session,
        general=ordered,
        history=same,
        lender=lender,
        run=chosen.run,
        sources=sources,
        replayed=replays[0].replay if replays else None,
    )


def _is_seen(spec: RunSpec, me: str) -> bool:
    return spec.customer == me or is_public(spec)


def _manifest_digest(facts: RunFacts) -> str:
    return facts.require_spec().base.manifest.digest


def _is_here(base: str, root: Path) -> bool:
    from connito.base.recipes import cached_base

    return cached_base(base).is_dir() if base in NAMED else (root / base / "config.json").is_file()


def _folder(base: str, root: Path, progress: Progress) -> Path:
    if base in NAMED:
        from connito.base.recipes import build_cached, cached_base

        target = cached_base(base)
        return (target if target.is_dir() else build_cached(base, progress)) / "model"
    folder = root / base
    if not folder.exists():
        raise NotFound(
            f"the base {base!r} is neither one that a run of yours or a public one used, nor demo or tiny, nor a folder of "
            f"this machine ({folder}); `connito job list` shows the platform's runs, `connito base build` makes a base"
        )
    return folder


def _manifest(base: str, folder: Path, progress: Progress) -> Manifest:
    from connito.base.description import build_manifest
    from connito.base.recipes import cached_manifest

    if base in NAMED:
        return cached_manifest(base)
    return build_manifest(folder, folder.name, progress)

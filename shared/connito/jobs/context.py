"""The context of a job: the base model that it names and, where one runs, the platform.

A job can be checked without a platform when the base is on this machine. With one, the base may be any that a run used,
and the domains of earlier runs are there to measure forgetting on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.data.corpus import Corpus
from connito.data.encoding import encoder_of
from connito.data.manifest import Manifest
from connito.errors import NotFound
from connito.jobs.spec import Job
from connito.platform.session import Session
from connito.runtime.progress import Progress, silent
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.run_pb2 import CorpusRef, RunSpec

if TYPE_CHECKING:
    from connito.wire.facts import RunFacts
    from connito.wire.log import Log

NAMED = ("demo", "tiny")
_TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens")


@dataclass
class JobContext:
    """Base and platform of a job.

    `folder` is set where the base is a folder of this machine, `manifest_ref` where the platform has it; at least one is.
    `general` are the general hold-outs of earlier runs on this base, `history` those runs, newest first. `taken` is the
    spec of an existing run of the job's id.
    """

    name: str
    manifest: Manifest
    folder: Path | None = None
    manifest_ref: ArtifactRef | None = None
    session: Session | None = None
    general: list[CorpusRef] = field(default_factory=list)
    history: list[RunFacts] = field(default_factory=list)
    taken: RunSpec | None = None
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
        return asyncio.run(self.session.store().fetch(ref))

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

    def general_corpora(self) -> Mapping[str, Corpus]:
        """Return the platform's general hold-outs by domain."""
        return {ref.domain: Corpus.load(self.fetch(ref.artifact)) for ref in self.general}


def open_context(job: Job, root: Path, data_dir: Path | None, progress: Progress = silent) -> JobContext:
    """Find the base that the job names: among the runs of the platform, then on this machine. Imports torch only where
    a base has to be built. Raises `NotFound` naming both places when it is in neither."""
    session = _session(data_dir)
    log = asyncio.run(_read(session)) if session is not None else None
    context = _from_platform(job, session, log) if session is not None and log is not None else None
    if context is None:
        folder = _folder(job.base, root, progress)
        manifest = _manifest(job.base, folder, progress)
        context = JobContext(manifest.name, manifest, folder=folder, session=session)
    if log is not None and job.run in log.runs:
        context.taken = log.runs[job.run].spec
    return context


def _session(data_dir: Path | None) -> Session | None:
    try:
        return Session.open(data_dir, role="customer")
    except NotFound:
        return None


async def _read(session: Session) -> Log:
    from connito.platform.log import read_log

    async with session.bus() as bus:
        return await read_log(bus, session.roster)


def _from_platform(job: Job, session: Session, log: Log) -> JobContext | None:
    """Return the base as the newest run of that base name used it, and the general domains of all runs on it."""
    created = [(fact.sequence, facts) for facts in log.runs.values() if (fact := facts.created_fact)]
    newest = [facts for _, facts in sorted(created, key=lambda pair: -pair[0])]
    runs = [facts for facts in newest if facts.spec is not None and facts.spec.base.name == job.base]
    if not runs or runs[0].spec is None:
        return None
    ref = runs[0].spec.base.manifest
    same = [facts for facts in runs if facts.spec is not None and facts.spec.base.manifest.digest == ref.digest]
    manifest = Manifest.load(asyncio.run(session.store().fetch(ref)))
    general: dict[str, CorpusRef] = {}
    for facts in same:
        assert facts.spec is not None
        for corpus in (facts.spec.holdout, *facts.spec.general_holdouts):
            if corpus.domain != job.domain:
                general.setdefault(corpus.domain, corpus)
    ordered = [general[domain] for domain in sorted(general)]
    return JobContext(job.base, manifest, manifest_ref=ref, session=session, general=ordered, history=same)


def _folder(base: str, root: Path, progress: Progress) -> Path:
    if base in NAMED:
        from connito.base.recipes import build_cached, cached_base

        target = cached_base(base)
        return (target if target.is_dir() else build_cached(base, progress)) / "model"
    folder = root / base
    if not (folder / "config.json").is_file():
        raise NotFound(
            f"the base {base!r} is neither one that a run of the platform used, nor demo or tiny, nor a folder with a "
            f"model ({folder}); `connito job list` shows the platform's runs, `connito base build` makes a base"
        )
    return folder


def _manifest(base: str, folder: Path, progress: Progress) -> Manifest:
    from connito.base.description import build_manifest
    from connito.base.recipes import MANIFEST

    if base in NAMED:
        return Manifest.load(folder.parent / MANIFEST)
    return build_manifest(folder, folder.name, progress)

"""Submit a checked job: upload its corpora, each into the realm of those who may read it, and create the run."""

from __future__ import annotations

import datetime
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from connito.data.corpus import Corpus
from connito.data.safetensors_header import SAFETENSORS
from connito.errors import Invalid, NotFound
from connito.jobs.check import Checked, check_file
from connito.jobs.findings import Finding, require
from connito.jobs.spec import is_job, read_run_spec, read_yaml
from connito.platform.session import Session
from connito.protocol.entitlement import base_proof
from connito.runtime.progress import Progress, silent
from connito.runtime.tasks import blocking
from connito.service.customer_store import CustomerStore
from connito.v1 import artifacts_pb2
from connito.v1.run_pb2 import BaseRef, CorpusRef, RunSpec
from connito.wire import sealing
from connito.wire.private import is_public, placed

PUBLIC, HOLDOUT = artifacts_pb2.REALM_PUBLIC, artifacts_pb2.REALM_HOLDOUT


@dataclass(frozen=True)
class Submitted:
    """A run that was created. `uploaded_bytes` is None for a bare RunSpec, which is neither checked nor uploaded."""

    run: str
    spec: RunSpec
    uploaded_bytes: int | None = None
    warnings: Sequence[Finding] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the document that `connito job submit --json` prints."""
        if self.uploaded_bytes is None:
            return {"run": self.run}
        return {
            "run": self.run, "domain": self.spec.domain, "cycles": self.spec.cycles, "bytes": self.uploaded_bytes,
            "warnings": [finding.to_json() for finding in self.warnings],
        }  # fmt: skip


def prepare(
    file: Path, data_dir: Path | None = None, progress: Progress = silent, *, profile: str = ""
) -> Checked | RunSpec:
    """Read what is to be submitted: a job.yaml, checked, or a RunSpec as YAML. Raises `Invalid` for errors in either."""
    if not is_job(read_yaml(file)):
        if profile:
            raise Invalid(f"{file} is a RunSpec, which states its policies itself: leave the profile out")
        return read_run_spec(file)
    checked = check_file(file, data_dir, progress, profile=profile)
    require(checked.findings, str(file))
    return checked


def submit(checked: Checked, create_run: Callable[[RunSpec], str], progress: Progress = silent) -> Submitted:
    """Upload the corpora and ask for the run by `create_run`, which returns its id.

    Raises `Invalid` for a job with errors, `NotFound` without a platform, `Retry` while broker or store are away.
    Submitting the same run id with the same job again is fine.
    """
    require(checked.findings)
    if checked.context.session is None:
        raise NotFound("no platform runs here; start one with `connito up --no-wait`, or set CONNITO_NATS_URL")
    spec = blocking(_upload(checked, CustomerStore(checked.context.session), progress))
    run = create_run(spec)
    total = sum(ref.artifact.size for ref in (spec.probe, spec.train, spec.holdout, *spec.general_holdouts))
    return Submitted(run, spec, total, [finding for finding in checked.findings if finding.level == "warning"])


def with_secret(spec: RunSpec, data_dir: Path | None) -> RunSpec:
    """Return a spec that lets what the run makes lie encrypted in the store, where it is not public."""
    if is_public(spec) or spec.secret.digest:
        return spec
    closed = RunSpec(secret=blocking(CustomerStore(Session.open(data_dir, role="customer")).secret(spec.run)))
    closed.MergeFrom(spec)
    return closed


async def _upload(checked: Checked, store: CustomerStore, progress: Progress) -> RunSpec:
    corpora, context, job = checked.corpora, checked.context, checked.job
    assert corpora is not None, "a job without errors has corpora"
    assert context.session is not None, "a job is submitted to a platform"
    me = context.session.identity
    readers = sealing.judges(context.session.roster, me.public)
    spec = RunSpec()
    spec.CopyFrom(checked.spec)
    spec.run = job.run or _run_id(job.domain, guessable=job.privacy.visibility == "public")
    spec.base.CopyFrom(await _base(checked, store, progress))
    spec.base.proof = base_proof(me.public, context.manifest.to_bytes())

    if job.privacy.visibility != "public":
        spec.secret.CopyFrom(await store.secret(spec.run))

    async def put(domain: str, corpus: Corpus, realm: artifacts_pb2.Realm.ValueType) -> CorpusRef:
        progress(f"uploading {domain}", 0.5)
        # The log says the digest to everybody: nobody who guesses the text can make sure of it.
        salt = me.derive("corpus", corpus.name).hex()
        corpus = replace(corpus, metadata={**corpus.metadata, "salt": salt})
        with tempfile.TemporaryDirectory() as folder:
            corpus.save(file := Path(folder) / "corpus.safetensors")
            if realm == PUBLIC:
                artifact = await store.put_file(file, SAFETENSORS, placed(spec))
                return CorpusRef(domain=domain, artifact=artifact, tokens=len(corpus.tokens))
            return CorpusRef(domain=domain, artifact=await seal(file))

    async def seal(file: Path) -> artifacts_pb2.ArtifactRef:
        sealing.seal_file(file, sealed := file.with_name("sealed"), me, readers)
        return await store.put_file(sealed, sealing.MEDIA_TYPE, HOLDOUT)

    spec.probe.CopyFrom(await put(job.domain, corpora.probe, PUBLIC))
    spec.train.CopyFrom(await put(job.domain, corpora.train, PUBLIC))
    spec.holdout.CopyFrom(await put(job.domain, corpora.holdout, HOLDOUT))
    # Those of earlier runs too: others may judge by now.
    for domain, corpus in (corpora.general or context.general_corpora()).items():
        spec.general_holdouts.append(await put(domain, corpus, HOLDOUT))
    if corpora.replay is not None:
        spec.replay.CopyFrom(await put("general", corpora.replay, PUBLIC))
    for name, corpus in corpora.benchmarks.items():
        spec.benchmarks.append(await put(name, corpus, HOLDOUT))
    for task in checked.texts.tasks:
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder) / "task.json").write_bytes(task.encode())
            spec.tasks.append(CorpusRef(domain=task.name, artifact=await seal(file)))
    return spec


async def _base(checked: Checked, store: CustomerStore, progress: Progress) -> BaseRef:
    """Return the platform's base, or upload the one from this machine."""
    from connito.base.upload import upload_base

    context = checked.context
    if context.manifest_ref is not None:
        return BaseRef(name=context.name, manifest=context.manifest_ref)
    assert context.folder is not None
    manifest = await upload_base(store, context.folder, context.manifest, progress)
    return BaseRef(name=context.name, manifest=manifest)


def _run_id(domain: str, *, guessable: bool) -> str:
    """Return a name for a run. Whoever asks for a name learns that it is taken, so that of a private run is not to be guessed."""
    name = f"{domain[:48]}-{datetime.datetime.now(datetime.UTC).strftime('%Y%m%d-%H%M%S')}"
    return name if guessable else f"{name}-{secrets.token_hex(6)}"

"""Check a job before anything is spent: every problem at once, with numbers and remedies."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from connito.jobs.context import JobContext, open_context
from connito.jobs.corpora import Corpora, build, template_of
from connito.jobs.findings import Finding, listed, worst
from connito.jobs.policies import check_policies, run_spec
from connito.jobs.spec import Job, read_job
from connito.jobs.texts import Texts, sort_texts
from connito.library.governance import TERMS, terms_of
from connito.library.start import AUTO, NONE, notice_of, refusal
from connito.moe.helper_experts import frozen_and_trained
from connito.render import formats
from connito.runtime.progress import Progress, silent
from connito.v1.run_pb2 import RunSpec
from connito.views.coverage import planned

_PERSONAL = {
    "e-mail addresses": re.compile(r"[\w.+-]+@[\w-]+\.[\w.]{2,}"),
    "telephone numbers": re.compile(r"(?<![\w.])\+\d{1,3}[ -]?(?:\d[ -]?){7,12}(?!\w)"),
    "private keys": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "access keys": re.compile(r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|sk-[A-Za-z0-9]{32,})\b"),
}


# From here on most of the text that somebody brought takes part.
LITTLE_READ = 0.5


@dataclass(repr=False)
class Checked:
    """A checked job with its findings. `corpora` is None where the text could not be prepared."""

    job: Job
    spec: RunSpec
    context: JobContext
    texts: Texts
    corpora: Corpora | None
    findings: list[Finding] = field(default_factory=list)

    def __repr__(self) -> str:
        return listed(self.findings)

    @property
    def ok(self) -> bool:
        """Return true if the job may be submitted."""
        return worst(self.findings) != "error"

    def to_json(self) -> dict[str, Any]:
        """Return the document that `connito job check --json` prints."""
        return {
            "domain": self.job.domain,
            "base": self.context.name,
            "ok": self.ok,
            "findings": [finding.to_json() for finding in self.findings],
            "parts": {} if self.corpora is None else self.corpora.sizes(),
            "fit": {} if self.corpora is None else {name: vars(fit) for name, fit in self.corpora.fit.items()},
        }


def check_file(file: Path, data_dir: Path | None = None, progress: Progress = silent, *, profile: str = "") -> Checked:
    """Check the job in a file; paths in it are relative to its folder. `profile` goes before the file's own."""
    job = read_job(file)
    job = job.model_copy(update={"profile": profile or job.profile})
    return check(job, file.absolute().parent, data_dir, progress)


def check(job: Job, root: Path, data_dir: Path | None = None, progress: Progress = silent) -> Checked:
    """Check a job's policies, text and terms. Problems with any of them are findings.

    Raises `NotFound` when the base is nowhere, `Retry` when broker or store are away, `Invalid` for a policy override
    that does not exist.
    """
    spec = run_spec(job)
    progress("looking for the base", 0.0)
    context = open_context(job, root, data_dir, progress)
    progress("reading the texts", 0.2)
    texts = sort_texts(job, root, progress)
    checked = Checked(
        job,
        spec,
        context,
        texts,
        None,
        [*texts.findings, *_terms(job), *_visibility(job), *_personal(texts), *_lent(context)],
    )
    if worst(texts.findings) != "error" or (texts.train and texts.probe and texts.holdout):
        progress("tokenising", 0.6)
        checked.corpora = build(job, texts, spec, context, template_of(job.chat_template, root))
        checked.findings += [*checked.corpora.findings, _coverage(job, spec, checked.corpora)]
    checked.findings += [*check_policies(job, spec, context), *_start(job, spec, context), *_budget(job, context)]
    progress("checked", 1.0)
    return checked


def _terms(job: Job) -> Iterator[Finding]:
    """Check that the licence is a known one, whose terms a program can apply, or a custom one that is marked as such."""
    name = job.license
    if (terms := terms_of(name)) is not None:
        limits = [word for word, allowed in (("commercial use", terms.commercial), ("derivatives", terms.derivatives),
                                             ("redistribution", terms.redistribution)) if not allowed]  # fmt: skip
        detail = f"{name}" + (f": no {', no '.join(limits)}" if limits else "")
        if not terms.derivatives:
            remedy = "an expert is a derivative of its text: get the right to make one, or leave the text out"
            yield Finding("licence", "error", detail, remedy)
            return
        yield Finding("licence", "ok", detail)
    elif re.fullmatch(r"LicenseRef-[A-Za-z0-9.-]+", name):
        remedy = "whoever uses the expert has to accept it by name (--accept-license)"
        yield Finding("licence", "warning", f"{name} is a licence of your own, whose terms no program knows", remedy)
    else:
        near = difflib.get_close_matches(name, [*TERMS, "LicenseRef-…"], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        remedy = f"{hint}use one of {', '.join(TERMS)}, or LicenseRef-<name> for terms of your own"
        yield Finding("licence", "error", f"{name!r} is not a licence identifier that is known here", remedy)
    if not job.data_statement.strip():
        remedy = "write in `data_statement` what the text is and where it comes from; it goes into the expert's record"
        yield Finding("licence", "warning", "there is no data statement", remedy)


def _lent(context: JobContext) -> Iterator[Finding]:
    """Say where the base's name means what another customer has called so."""
    if context.lender:
        digest = context.manifest.digest
        remedy = f"check that it is the one that you mean, and name it by its digest: base: {digest}"
        detail = f"the base {context.name} (manifest {digest[:12]}…) is from another customer's run, {context.lender}"
        yield Finding("base", "warning", detail, remedy)


def _start(job: Job, spec: RunSpec, context: JobContext) -> Iterator[Finding]:
    """Check that the job may begin where it says, by the selector's own rules."""
    if job.start_from in (AUTO, NONE) or context.session is None:
        return
    wanted = RunSpec()
    wanted.CopyFrom(spec)
    wanted.customer = context.session.identity.public
    said, record = context.experts.get(job.start_from), context.record_of(job.start_from)
    if said is None or record is None:
        near = difflib.get_close_matches(job.start_from, [*context.experts, AUTO], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        remedy = (
            f"{hint}name an expert of the platform's library (`connito library list`; `connito library deposit` brings in what "
            "is made of its experts), or write start_from: auto"
        )
        yield Finding("start", "error", f"the platform's library has no expert {job.start_from!r}", remedy)
    elif said.base_digest != context.manifest.digest:
        base, mine = said.base_digest, context.manifest.digest
        detail = f"{job.start_from} is of another base ({base[:12]}…) than this job's ({mine[:12]}…)"
        yield Finding("start", "error", detail, "start from one of the same base, or write start_from: auto")
    elif said.files:
        remedy = "export it and make it the base of the job, or write start_from: auto"
        yield Finding(
            "start", "error", f"{job.start_from} is a whole model made of experts, not rows of this base", remedy
        )
    elif why := notice_of(record, job.start_from, context.against) or refusal(record, wanted):
        yield Finding(
            "start", "error", f"the run cannot begin at {job.start_from}: {why}", "write start_from: auto or none"
        )
    else:
        yield Finding("start", "ok", f"the run begins at {job.start_from}")


def _coverage(job: Job, spec: RunSpec, corpora: Corpora) -> Finding:
    """Say how much of the training text the run will read, and what it costs in reward units."""
    miners, cycles = max(1, job.people.miners), spec.cycles
    read = planned(spec, miners, cycles, len(corpora.train.tokens))
    planned_for = f"{formats.count(cycles, 'cycle')} of {formats.count(miners, 'miner')}"
    detail = f"{planned_for} read {read}; they pay out {formats.count(spec.emission * cycles, 'reward unit')} at most"
    numbers = {"read": read.read, "there": read.there, "share": read.share, "emission": spec.emission * cycles}
    if read.share >= LITTLE_READ:
        return Finding("coverage", "ok", detail, "", numbers)
    remedy = (
        "what is not read teaches nothing: raise objective.max_cycles, people.miners or policies.training.local_steps, or "
        "bring the best part of the text alone"
    )
    return Finding("coverage", "warning", detail, remedy, numbers)


def _budget(job: Job, context: JobContext) -> Iterator[Finding]:
    """Check that the smallest possible job fits the budget. What this job needs is computed by the quote."""
    sizes = context.manifest.expert_bytes()
    smallest = sum(frozen_and_trained(context.manifest, {layer: [0] for layer in sizes}))
    for name, cap, minimum, what in (
        ("upload", job.budget.upload, min(sizes.values()), "one expert of this base has"),
        ("memory", job.budget.memory, smallest, "with one expert a layer, the weights alone take"),
    ):
        if not cap:
            continue
        numbers = {"budget": cap, "least": minimum}
        detail = f"budget.{name} is {formats.size(cap)}; {what} {formats.size(minimum)}"
        if cap < minimum:
            remedy = f"allow at least {formats.size(minimum)} (`connito job quote` says what this job takes), or a smaller base"
            yield Finding("budget", "error", detail, remedy, numbers)
        else:
            yield Finding("budget", "ok", detail, "", numbers)


def _visibility(job: Job) -> Iterator[Finding]:
    shown = {
        "public": "everyone",
        "organisation": f"the organisation {job.privacy.organisation}",
        "private": "you alone",
    }
    detail = f"the expert is shown to {shown[job.privacy.visibility]}; the training text is read by every miner that takes part"
    yield Finding("privacy", "ok", detail, "", {"visibility": job.privacy.visibility})


def _personal(texts: Texts) -> Iterator[Finding]:
    """Search the text for personal data by patterns, which can miss some and flag text that is harmless."""
    counts = dict.fromkeys(_PERSONAL, 0)
    first: dict[str, str] = {}
    for document in chain(texts.train, texts.probe):
        for kind, pattern in _PERSONAL.items():
            hits = len(pattern.findall(document.text))
            if hits:
                counts[kind] += hits
                first.setdefault(kind, document.where)
    found = {kind: count for kind, count in counts.items() if count}
    if found:
        what = ", ".join(f"{count} {kind} (first in {first[kind]})" for kind, count in found.items())
        remedy = "miners read this text: remove what must not be shared"
        yield Finding("privacy", "warning", f"the training text seems to hold {what}", remedy, found)

"""Policies of the run that a job asks for, and their check by the rules that the coordinator applies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from connito.errors import Invalid
from connito.jobs.context import JobContext
from connito.jobs.findings import Finding
from connito.jobs.spec import Job
from connito.protocol.policy.check import faults
from connito.protocol.policy.law import fill
from connito.protocol.policy.profiles import override, policies
from connito.protocol.tenancy import check_submission
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, ArtifactRef, Realm
from connito.v1.reasons_pb2 import REASON_BAD_SPEC
from connito.v1.run_pb2 import BaseRef, CorpusRef, RunSpec
from connito.wire.bounds import check_bounds
from connito.wire.private import is_public

# An id for the check alone, where the job names none: submitting makes one of domain and time.
_UNNAMED = "unnamed"
# Fields of a RunSpec that a job calls otherwise.
_IN_JOB = {
    "data_sources": "data", "emission": "budget.emission", "enrolment.allowed": "people.allowed",
    "enrolment.max_miners": "people.at_most", "organisation": "privacy.organisation",
}  # fmt: skip


def run_spec(job: Job) -> RunSpec:
    """Return the run that the job asks for, with every policy and without artifacts.

    Raises `Invalid` naming every policy that does not exist or cannot have its value.
    """
    spec = policies(job.profile)
    spec.run, spec.domain, spec.cycles = job.run, job.domain, job.cycles
    spec.windows.min_miners, spec.windows.min_validators = job.people.miners, job.people.validators
    spec.enrolment.mode, spec.enrolment.max_miners = job.people.enrolment, job.people.at_most
    spec.enrolment.allowed[:] = job.people.allowed
    spec.license, spec.data_statement = job.license, job.data_statement
    spec.emission = job.budget.emission or spec.emission
    spec.training.replay_share = job.replay or 0.0
    if job.objective.improvement:
        spec.objective.improvement = job.objective.improvement
    spec.start_from = job.start_from
    spec.visibility, spec.organisation = job.privacy.visibility, job.privacy.organisation
    spec.data_sources[:] = sorted({source.name or Path(source.path).stem or source.path for source in job.data})
    _override(spec, job.policies)
    if job.budget.upload:
        spec.selection.max_bytes = min(job.budget.upload, spec.selection.max_bytes or job.budget.upload)
    fill(spec)
    return spec


def _override(spec: RunSpec, policies: Mapping[str, Mapping[str, object]]) -> None:
    wrong = []
    for section, fields in policies.items():
        for name, value in fields.items():
            try:
                override(spec, f"{section}.{name}", value)
            except Invalid as error:
                wrong.append(f"  {error}")
    if wrong:
        note = "  (a job says who may mine in `people`, and when to stop in `objective`)"
        elsewhere = [note] if policies.keys() & {"enrolment", "objective"} else []
        raise Invalid("\n".join(["policies cannot be set:", *wrong, *elsewhere]), reason=REASON_BAD_SPEC)


def _twice(job: Job) -> Iterator[Finding]:
    """Yield an error for what the job says in its own field and, differently, among the policies."""
    for own, value, section, name in (
        ("people.miners", job.people.miners, "windows", "min_miners"),
        ("people.validators", job.people.validators, "windows", "min_validators"),
        ("replay", job.replay, "training", "replay_share"),
    ):
        other = job.policies.get(section, {}).get(name, value)
        given = own == "replay" or own.removeprefix("people.") in job.people.model_fields_set
        if given and value is not None and other is not None and float(other) != value:
            detail = f"policies.{section}.{name} is {other}, but {own} is {value:g}"
            yield Finding("policy", "error", detail, f"say it in `{own}` alone")


def check_policies(job: Job, spec: RunSpec, context: JobContext) -> Iterator[Finding]:
    """Yield an error for everything for which the coordinator would refuse the run once its artifacts are uploaded."""
    customer, organisations = "", None
    if context.session is not None:
        customer = context.session.identity.public
        organisations = context.session.roster.memberships(customer)
    asked = _with_stand_ins(job, spec, context)
    fill(asked, customer)
    found = [*_twice(job)]
    for fault in faults(asked, customer, organisations):
        problem = fault.problem.replace("windows.min_miners", "people.miners")
        found.append(Finding("policy", "error", f"{_IN_JOB.get(fault.field, fault.field)} {problem}", fault.remedy))
    yield from found
    if context.session is not None and context.runs is not None:
        try:
            context.session.roster.require("customer", customer)
            check_bounds(asked)
            check_submission(asked, customer, context.session.roster, context.runs)
        except Invalid as error:
            detail, _, remedy = str(error).partition("; ")
            found.append(Finding("customer", "error", detail, remedy))
            yield found[-1]
    if context.taken is not None and not _same_policies(context.taken, asked):
        detail = f"run is {job.run!r}, and a run of that id asks for something else"
        yield Finding("policy", "error", detail, "choose another id, or leave it out")
    if not found:
        over = "the platform's policies" if job.profile == "platform" else f"the policies of the {job.profile} profile"
        yield Finding("policy", "ok", f"{over}; {sum(map(len, job.policies.values()))} set by the job")


def _with_stand_ins(job: Job, spec: RunSpec, context: JobContext) -> RunSpec:
    """Return a copy in which every artifact that an upload will bring has a reference of the right form."""
    asked = RunSpec()
    asked.CopyFrom(spec)
    asked.run = spec.run or _UNNAMED
    asked.base.CopyFrom(BaseRef(name=context.name, manifest=_stand_in(REALM_PUBLIC)))
    if not is_public(spec):
        asked.secret.CopyFrom(_stand_in(REALM_PUBLIC))
    asked.probe.CopyFrom(_corpus(job.domain, REALM_PUBLIC))
    asked.train.CopyFrom(_corpus(job.domain, REALM_PUBLIC))
    asked.holdout.CopyFrom(_corpus(job.domain, REALM_HOLDOUT))
    # Where there is no general text at all, the finding about sizes says so.
    names = [entry.domain for entry in job.general] or context.general_domains() or [f"not-{job.domain}"]
    asked.general_holdouts.extend(_corpus(name, REALM_HOLDOUT) for name in names)
    if spec.training.replay_share:
        asked.replay.CopyFrom(_corpus("general", REALM_PUBLIC))
    for entry in job.benchmarks:
        (asked.tasks if entry.task else asked.benchmarks).append(_corpus(entry.name, REALM_HOLDOUT))
    return asked


def _corpus(domain: str, realm: Realm.ValueType) -> CorpusRef:
    return CorpusRef(domain=domain, artifact=_stand_in(realm))


def _stand_in(realm: Realm.ValueType) -> ArtifactRef:
    return ArtifactRef(digest="0" * 64, size=1, realm=realm)


def _same_policies(one: RunSpec, other: RunSpec) -> bool:
    """Return whether two specs agree, whatever their artifacts are."""
    first, second = RunSpec(), RunSpec()
    for spec, copy in ((one, first), (other, second)):
        copy.CopyFrom(spec)
        for name in (
            "base",
            "probe",
            "train",
            "holdout",
            "general_holdouts",
            "replay",
            "benchmarks",
            "tasks",
            "beside",
        ):
            copy.ClearField(name)
    return first == second

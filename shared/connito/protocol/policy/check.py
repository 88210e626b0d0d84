"""Check a run's spec against the law of policies: every fault, with field and remedy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from connito.data.documents import is_shown
from connito.errors import Invalid
from connito.library.governance import VISIBILITIES
from connito.protocol.policy.law import (
    LAW,
    MAX_ALLOWED,
    MAX_CORPORA,
    MAX_CYCLE_SEQUENCES,
    MAX_CYCLE_TOKENS,
    MAX_CYCLES,
    MAX_EMISSION,
    MAX_RANKS,
    MAX_SOURCE_NAME,
    MAX_SOURCES,
    MAX_TEXT,
    Choice,
    Number,
    fill,
    read,
)
from connito.protocol.scoring import payout
from connito.v1 import reasons_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PRIVATE, REALM_PUBLIC, ArtifactRef, Realm
from connito.v1.run_pb2 import CorpusRef, RewardPolicy, RunSpec
from connito.wire.enums import name_of
from connito.wire.hashing import is_digest
from connito.wire.identity import is_public_key
from connito.wire.private import is_public
from connito.wire.subjects import INSTALLATION, LIBRARY, check_token


@dataclass(frozen=True)
class Fault:
    """Fault of one field of a spec."""

    field: str
    problem: str
    remedy: str
    reason: reasons_pb2.Reason.ValueType = reasons_pb2.REASON_BAD_SPEC

    def __str__(self) -> str:
        return f"{self.field} {self.problem}; {self.remedy}"


def complete(spec: RunSpec, customer: str, organisations: Collection[str] | None = None) -> RunSpec:
    """Return a copy with every default filled in. Raises `Invalid` that names each fault of the spec with its remedy.

    `customer` is the public key that signed the spec; a spec that names another key as its customer is refused.
    `organisations` are those that the customer belongs to; None leaves that unchecked.
    """
    full = RunSpec()
    full.CopyFrom(spec)
    fill(full, customer)
    found = list(faults(full, customer, organisations))
    if found:
        raise Invalid("\n".join(map(str, found)), reason=found[0].reason)
    return full


def faults(spec: RunSpec, customer: str, organisations: Collection[str] | None = None) -> Iterator[Fault]:
    """Yield everything that is wrong with a spec whose defaults are filled in; arguments as for `complete`."""
    yield from _names(spec, customer)
    yield from _terms(spec, organisations)
    yield from _artifacts(spec)
    for path, rule in LAW.items():
        yield from _field(spec, path, rule)
    yield from _payout(spec.rewards)
    yield from _enrolment(spec)
    windows, training = spec.windows, spec.training
    if windows.floor_seconds > windows.ceiling_seconds:
        yield Fault("windows.floor_seconds", "is larger than windows.ceiling_seconds", "swap them or raise the ceiling")
    rows = training.local_steps * training.batch_sequences
    if rows > MAX_CYCLE_SEQUENCES or rows * training.sequence_length > MAX_CYCLE_TOKENS:
        problem = f"makes {rows} sequences of {training.sequence_length} tokens a cycle with training.batch_sequences"
        remedy = (
            f"choose at most {MAX_CYCLE_SEQUENCES} sequences and {MAX_CYCLE_TOKENS} tokens a cycle, and more cycles"
        )
        yield Fault("training.local_steps", problem, remedy)
    if spec.selection.background and training.routing_mode != "natural":
        problem = f"needs natural routing, not {training.routing_mode}"
        yield Fault("selection.background", problem, "leave one of them out")
    if training.replay_share > 0 and not spec.replay.artifact.digest:
        yield Fault("training.replay_share", "is set but there is no replay corpus", "give `replay` or set it to 0")


def _field(spec: RunSpec, path: str, rule: Number | Choice) -> Iterator[Fault]:
    value = read(spec, path)
    if isinstance(rule, Choice):
        if value not in rule.choices:
            yield Fault(path, f"is {value!r}", f"choose one of {', '.join(rule.choices)}")
    elif not (rule.zero and value == 0) and not (
        math.isfinite(number := float(value)) and rule.low <= number <= rule.high
    ):
        yield Fault(path, f"is {number:g}", f"choose {rule.low:g} to {rule.high:g}")


def _names(spec: RunSpec, customer: str) -> Iterator[Fault]:
    yield from _token("run", spec.run)
    if spec.run in (INSTALLATION, LIBRARY):
        yield Fault("run", f"is {spec.run!r}, which stands for every run", "choose another id")
    yield from _token("domain", spec.domain)
    if not 1 <= spec.cycles <= MAX_CYCLES:
        yield Fault("cycles", f"is {spec.cycles}", f"ask for 1 to {MAX_CYCLES}")
    if not (0 < len(spec.base.name) <= MAX_SOURCE_NAME and spec.base.name.isprintable()):
        problem = f"is {spec.base.name[:80]!r}"
        yield Fault("base.name", problem, f"name the base model in 1 to {MAX_SOURCE_NAME} printable characters")
    if spec.customer != customer:
        yield Fault("customer", f"is {spec.customer!r}, but the spec is signed by {customer}", "leave it empty")
    if spec.start_from:
        yield from _token("start_from", spec.start_from)


def _token(field: str, text: str) -> Iterator[Fault]:
    try:
        check_token(text, field)
    except Invalid:
        yield Fault(field, f"is {text[:80]!r}", "use 1 to 80 letters, digits, '-' and '_'")


def _terms(spec: RunSpec, organisations: Collection[str] | None) -> Iterator[Fault]:
    if spec.emission > MAX_EMISSION:
        yield Fault("emission", f"is {spec.emission}", "units above 2^53 cannot be shared out exactly; choose fewer")
    if spec.visibility not in ("", *VISIBILITIES):
        yield Fault("visibility", f"is {spec.visibility!r}", f"choose one of {', '.join(VISIBILITIES)}")
    if spec.visibility == "organisation" and not spec.organisation:
        yield Fault("organisation", "is empty", "name the organisation that may see the expert")
    if spec.organisation and organisations is not None and spec.organisation not in organisations:
        yield Fault(
            "organisation",
            f"is {spec.organisation!r}, to which the roster does not count {spec.customer}",
            "leave it out, or have the operator add the key to the organisation",
            reasons_pb2.REASON_NOT_PERMITTED,
        )
    if len(spec.data_sources) > MAX_SOURCES or any(
        not (0 < len(name) <= MAX_SOURCE_NAME and name.isprintable()) for name in spec.data_sources
    ):
        yield Fault(
            "data_sources",
            "names too many sources, or one without a name or with too long a one",
            f"give at most {MAX_SOURCES} of 1 to {MAX_SOURCE_NAME} printable characters",
        )
    for field in ("license", "data_statement"):
        if len(getattr(spec, field)) > MAX_TEXT:
            yield Fault(field, f"is longer than {MAX_TEXT} characters", "link to the long text instead")
        elif not is_shown(getattr(spec, field)):
            # It goes into the expert's record, which nobody could read then.
            yield Fault(field, "holds control characters", "leave out all but letters, signs and ends of lines")


def _payout(rewards: RewardPolicy) -> Iterator[Fault]:
    if rewards.payout not in payout.names():
        known = ", ".join(payout.names())
        yield Fault("rewards.payout", f"is {rewards.payout!r}", f"choose one of {known}, or install what registers it")
    table = list(rewards.rank_shares)
    if table and (len(table) > MAX_RANKS or table != sorted(table, reverse=True) or not table[0]):
        yield Fault("rewards.rank_shares", f"is {table[:8]}", f"give up to {MAX_RANKS} shares, the largest first")


def _enrolment(spec: RunSpec) -> Iterator[Fault]:
    policy, field = spec.enrolment, "enrolment.allowed"
    if policy.mode == "open" and policy.allowed:
        yield Fault(field, "names keys, but the mode is open", "choose allow-list or invite, or leave it out")
    if policy.mode == "allow-list" and not policy.allowed:
        yield Fault(field, "is empty", "an allow-list of nobody lets nobody in; name keys or choose invite")
    if len(policy.allowed) > MAX_ALLOWED:
        yield Fault(field, f"names {len(policy.allowed)} keys", f"up to {MAX_ALLOWED}; use invites beyond")
    for key in policy.allowed:
        if not is_public_key(key):
            yield Fault(field, f"holds {key[:80]!r}", "give public keys (U…) as `connito miner init` prints")
    if policy.max_miners and policy.max_miners < spec.windows.min_miners:
        yield Fault("enrolment.max_miners", "is below windows.min_miners", "raise it, or the run can never start")


def _artifacts(spec: RunSpec) -> Iterator[Fault]:
    for name in ("beside", "general_holdouts", "benchmarks", "tasks"):
        if len(getattr(spec, name)) > MAX_CORPORA:
            yield Fault(name, f"has {len(getattr(spec, name))} entries", f"give at most {MAX_CORPORA}")
            return
    text = (REALM_PUBLIC, REALM_PRIVATE) if spec.secret.digest else (REALM_PUBLIC,)
    yield from _ref("base.manifest", spec.base.manifest, REALM_PUBLIC)
    yield from _corpus("probe", spec.probe, *text, REALM_HOLDOUT)
    yield from _corpus("train", spec.train, *text)
    yield from _corpus("holdout", spec.holdout, REALM_HOLDOUT)
    if spec.HasField("replay"):
        yield from _corpus("replay", spec.replay, *text)
    for index, corpus in enumerate(spec.beside):
        yield from _corpus(f"beside[{index}]", corpus, *text, REALM_HOLDOUT)
    if spec.secret.digest:
        yield from _ref("secret", spec.secret, REALM_PUBLIC)
    elif not is_public(spec):
        remedy = "submit with a client of this version, which uploads one"
        yield Fault("secret", "is empty, so what the run makes would lie open in the store", remedy)
    corpora = (spec.train, spec.probe, spec.replay, *spec.beside)
    if any(
        ref.secret != (spec.secret.digest if ref.realm == REALM_PRIVATE else "")
        for ref in (corpus.artifact for corpus in corpora)
    ):
        yield Fault("secret", "is not the one that a corpus is encrypted under", "give one secret for all of a run")
    if _twice([spec.domain, *(corpus.domain for corpus in spec.beside)]):
        yield Fault("beside", "names a domain twice, or the target's own", "give each further domain once")
    if not spec.general_holdouts:
        yield Fault("general_holdouts", "is empty", "give at least one, or forgetting could not be measured")
    for field in ("general_holdouts", "benchmarks", "tasks"):
        for index, corpus in enumerate(getattr(spec, field)):
            yield from _corpus(f"{field}[{index}]", corpus, REALM_HOLDOUT)
    if spec.holdout.domain != spec.domain:
        yield Fault("holdout.domain", f"is {spec.holdout.domain!r}", f"it has to be the run's domain, {spec.domain!r}")
    if _twice([spec.domain, *(corpus.domain for corpus in spec.general_holdouts)]):
        yield Fault("general_holdouts", "names a domain twice, or the target's own", "give each general domain once")


def _twice(domains: list[str]) -> bool:
    return len(set(domains)) != len(domains)


def _corpus(field: str, corpus: CorpusRef, *realms: Realm.ValueType) -> Iterator[Fault]:
    yield from _token(f"{field}.domain", corpus.domain)
    yield from _ref(f"{field}.artifact", corpus.artifact, *realms)


def _ref(field: str, ref: ArtifactRef, *realms: Realm.ValueType) -> Iterator[Fault]:
    if not is_digest(ref.digest):
        remedy = "put the artifact into the store and give its SHA-256 in hex"
        yield Fault(f"{field}.digest", f"is {ref.digest[:80]!r}", remedy)
    if ref.size <= 0:
        yield Fault(f"{field}.size", f"is {ref.size}", "give the object's length in bytes")
    if ref.realm not in realms:
        allowed = " or ".join(Realm.Name(realm) for realm in realms)
        yield Fault(f"{field}.realm", f"is {name_of(Realm, ref.realm)}", f"it has to be {allowed}")

"""Checking what a customer asks for: defaults for what was left open, a clear refusal for what cannot work.

A policy that is left out altogether takes every default. In one that is given, a zero means "default" where zero makes
no sense (a learning rate) and means zero where it does (a weight decay).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from connito.enums import name_of
from connito.errors import Invalid
from connito.library.governance import VISIBILITIES
from connito.protocol.scoring import payout
from connito.v1 import reasons_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, ArtifactRef, Realm
from connito.v1.run_pb2 import (
    CorpusRef,
    EnrolmentPolicy,
    MergePolicy,
    RewardPolicy,
    RunSpec,
    ScorePolicy,
    SelectionPolicy,
    TrainPolicy,
    WindowPolicy,
)
from connito.wire.identity import is_public_key
from connito.wire.subjects import INSTALLATION, check_token

METHODS = {"esft-token": 0.2, "esft-gate": 0.1, "differential": 0.2, "des-moe": 0.6}
ROUTING_MODES = ("natural", "masked", "restricted")
SCOPES, RULES = ("global", "layer"), ("share", "duplicate", "exclusive")
MOMENTS = ("fresh", "kept", "second")
AGGREGATORS = (
    "mean",
    "utility-mean",
    "top-1",
    "coordinate-median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "geometric-median",
    "norm-clipped-mean",
)
MAX_CYCLES = 1000
# What a selection's report holds, since diagnostics by domain and exact statistics.
REPORT_VERSION = 1
MAX_SOURCES, MAX_SOURCE_NAME = 100, 200
MAX_TEXT = 4000
MAX_RANKS = 10_000
ENROLMENT = ("open", "allow-list", "invite")
MAX_ALLOWED = 10_000

DEFAULTS = RunSpec(
    selection=SelectionPolicy(
        method="esft-token", helpers_per_layer=2, scope="global", contested="share", causal_effects=4
    ),
    training=TrainPolicy(
        local_steps=10,
        sequence_length=128,
        batch_sequences=4,
        learning_rate=2e-4,
        weight_decay=0.01,
        routing_mode="natural",
        moments="second",
        beta1=0.5,
    ),
    scoring=ScorePolicy(
        target_sequences=32,
        general_sequences=16,
        confidence=0.95,
        retention_margin=0.02,
        copy_threshold=0.95,
        copy_span_threshold=0.95,
        copy_effect_threshold=0.08,
        paid_ranks=10,
        max_relative_norm=0.5,
    ),
    merging=MergePolicy(
        aggregator="utility-mean",
        outer_learning_rate=0.7,
        outer_momentum=0.9,
        gate_target_sequences=32,
        gate_general_sequences=16,
        gate_general_margin=0.01,
        report_target_sequences=32,
        report_general_sequences=16,
    ),
    windows=WindowPolicy(min_miners=1, min_validators=1, floor_seconds=10, ceiling_seconds=1800, assemble_seconds=900),
    # Yuma's rate. A new key is one more miner, so that a stranger is not punished for being one; see the trust model.
    rewards=RewardPolicy(payout=payout.DEFAULT, bond_rate=0.1, probation_pay=0.5),
    emission=1_000_000,
    enrolment=EnrolmentPolicy(mode="open", messages_per_cycle=16),
)


@dataclass(frozen=True)
class _Range:
    """Limits of one number. `zero` says that 0 is a value of its own and takes no default."""

    low: float
    high: float
    zero: bool = False


_RANGES: dict[str, _Range] = {
    "selection.threshold": _Range(1e-6, 1),
    "selection.max_experts": _Range(0, 1_000_000, zero=True),
    "selection.max_bytes": _Range(0, 1 << 50, zero=True),
    "selection.helpers_per_layer": _Range(0, 4096, zero=True),
    "selection.max_vram": _Range(0, 1 << 50, zero=True),
    "selection.causal_effects": _Range(0, 4096, zero=True),
    "selection.helper_max_bytes": _Range(0, 1 << 50, zero=True),
    "selection.resident_max_bytes": _Range(0, 1 << 50, zero=True),
    "training.local_steps": _Range(1, 100_000),
    "training.sequence_length": _Range(4, 1 << 20),
    "training.batch_sequences": _Range(1, 65_536),
    "training.learning_rate": _Range(1e-9, 1),
    "training.weight_decay": _Range(0, 1, zero=True),
    "training.replay_share": _Range(0, 0.9, zero=True),
    "training.final_rate_share": _Range(0, 1, zero=True),
    "training.warmup_steps": _Range(0, 100_000, zero=True),
    "training.beta1": _Range(0, 0.999, zero=True),
    "training.router_distillation": _Range(0, 1000, zero=True),
    "training.distillation_share": _Range(0, 1, zero=True),
    "scoring.target_sequences": _Range(1, 1_000_000),
    "scoring.general_sequences": _Range(1, 1_000_000),
    "scoring.confidence": _Range(0.5, 0.9999),
    "scoring.retention_margin": _Range(0, 10, zero=True),
    "scoring.copy_threshold": _Range(0.1, 1),
    "scoring.copy_span_threshold": _Range(0.1, 1),
    "scoring.copy_effect_threshold": _Range(1e-6, 1),
    "scoring.paid_ranks": _Range(1, 1_000_000),
    "scoring.max_relative_norm": _Range(1e-6, 100),
    "scoring.validators_per_submission": _Range(0, 1_000, zero=True),
    "scoring.minimum_sequences": _Range(0, 1_000_000, zero=True),
    "merging.outer_learning_rate": _Range(1e-6, 10),
    "merging.outer_momentum": _Range(0, 0.999, zero=True),
    "merging.gate_target_sequences": _Range(1, 1_000_000),
    "merging.gate_general_sequences": _Range(1, 1_000_000),
    "merging.gate_general_margin": _Range(0, 10, zero=True),
    "merging.report_target_sequences": _Range(1, 1_000_000),
    "merging.report_general_sequences": _Range(1, 1_000_000),
    "rewards.validator_share": _Range(0, 0.9, zero=True),
    "rewards.bond_rate": _Range(0, 1, zero=True),
    "rewards.probation_cycles": _Range(0, 1_000, zero=True),
    "rewards.probation_pay": _Range(0, 1, zero=True),
    "rewards.newcomers_per_cycle": _Range(0, 1_000_000, zero=True),
    "enrolment.max_miners": _Range(0, 100_000, zero=True),
    "enrolment.messages_per_cycle": _Range(0, 100_000, zero=True),
    "objective.improvement": _Range(0, 100, zero=True),
    "windows.min_miners": _Range(1, 10_000),
    "windows.min_validators": _Range(1, 1_000),
    "windows.floor_seconds": _Range(0.05, 86_400),
    "windows.ceiling_seconds": _Range(0.1, 604_800),
    "windows.assemble_seconds": _Range(0.1, 604_800),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "selection.method": tuple(METHODS),
    "selection.scope": SCOPES,
    "selection.contested": RULES,
    "training.routing_mode": ROUTING_MODES,
    "training.moments": MOMENTS,
    "merging.aggregator": AGGREGATORS,
    "enrolment.mode": ENROLMENT,
}
MAX_SOURCES, MAX_SOURCE_NAME = 100, 200


def bad(field: str, problem: str, remedy: str) -> Invalid:
    """The refusal of one field of a spec."""
    return Invalid(f"{field} {problem}; {remedy}", reason=reasons_pb2.REASON_BAD_SPEC)


def complete(spec: RunSpec, customer: str) -> RunSpec:
    """A copy with every default filled in and everything checked. Raises `Invalid` naming field and remedy.

    `customer` is the public key that signed the spec; a spec that names another key as its customer is refused.
    """
    full = RunSpec()
    full.CopyFrom(spec)
    _fill(full, customer)
    _check_names(full, customer)
    _check_artifacts(full)
    for path, limits in _RANGES.items():
        _check_range(full, path, limits)
    for path, choices in _CHOICES.items():
        if _read(full, path) not in choices:
            raise bad(path, f"is {_read(full, path)!r}", f"choose one of {', '.join(choices)}")
    _check_payout(full.rewards)
    _check_enrolment(full)
    windows = full.windows
    if windows.floor_seconds > windows.ceiling_seconds:
        raise bad("windows.floor_seconds", "is larger than windows.ceiling_seconds", "swap them or raise the ceiling")
    training = full.training
    if training.router_distillation > 0 and training.distillation_share == 0:
        training.distillation_share = 0.5
    if full.selection.background and training.routing_mode != "natural":
        raise bad(
            "selection.background", f"needs natural routing, not {training.routing_mode}", "leave one of them out"
        )
    if full.training.replay_share > 0 and not full.replay.artifact.digest:
        raise bad("training.replay_share", "is set but there is no replay corpus", "give `replay` or set it to 0")
    return full


def _fill(spec: RunSpec, customer: str) -> None:
    for name in ("selection", "training", "scoring", "merging", "windows", "rewards", "enrolment"):
        if not spec.HasField(name):
            getattr(spec, name).CopyFrom(getattr(DEFAULTS, name))
    for path, limits in _RANGES.items():
        if _left_out(spec, path, limits) and path != "selection.threshold":
            _write(spec, path, _read(DEFAULTS, path))
    for path in _CHOICES:
        _write(spec, path, _read(spec, path) or _read(DEFAULTS, path))
    if spec.selection.threshold == 0:
        spec.selection.threshold = METHODS.get(spec.selection.method, 0.2)
    spec.rewards.payout = spec.rewards.payout or DEFAULTS.rewards.payout
    spec.selection.report_version = REPORT_VERSION
    spec.emission = spec.emission or DEFAULTS.emission
    spec.customer = spec.customer or customer


def _left_out(spec: RunSpec, path: str, limits: _Range) -> bool:
    """Whether a number takes its default: it is absent where the schema tells that from 0, or is 0 where 0 is no value."""
    policy, name = path.split(".")
    part = getattr(spec, policy)
    if part.DESCRIPTOR.fields_by_name[name].has_presence:
        return not part.HasField(name)
    return not limits.zero and _read(spec, path) == 0


def _check_payout(rewards: RewardPolicy) -> None:
    if rewards.payout not in payout.names():
        known = ", ".join(payout.names())
        raise bad("rewards.payout", f"is {rewards.payout!r}", f"choose one of {known}, or install what registers it")
    table = list(rewards.rank_shares)
    if table and (len(table) > MAX_RANKS or table != sorted(table, reverse=True) or not table[0]):
        raise bad("rewards.rank_shares", f"is {table[:8]}", f"give up to {MAX_RANKS} shares, the largest first")


def _check_names(spec: RunSpec, customer: str) -> None:
    check_token(spec.run, "run (the run's id)")
    if spec.run == INSTALLATION:
        raise bad("run", f"is {spec.run!r}, which stands for every run", "choose another id")
    check_token(spec.domain, "domain")
    if not 1 <= spec.cycles <= MAX_CYCLES:
        raise bad("cycles", f"is {spec.cycles}", f"ask for 1 to {MAX_CYCLES}")
    if not spec.base.name:
        raise bad("base.name", "is empty", "name the base model, for example by `connito base show`")
    if spec.customer != customer:
        raise bad("customer", f"is {spec.customer!r}, but the spec is signed by {customer}", "leave it empty")
    if spec.emission > 1 << 53:
        raise bad("emission", f"is {spec.emission}", "units above 2^53 cannot be shared out exactly; choose fewer")
    if spec.start_from:
        check_token(spec.start_from, "start_from (auto, none, or an expert's id)")
    if spec.visibility not in ("", *VISIBILITIES):
        raise bad("visibility", f"is {spec.visibility!r}", f"choose one of {', '.join(VISIBILITIES)}")
    if spec.visibility == "organisation" and not spec.organisation:
        raise bad("organisation", "is empty", "name the organisation that may see the expert")
    if len(spec.data_sources) > MAX_SOURCES or any(not 0 < len(name) <= MAX_SOURCE_NAME for name in spec.data_sources):
        raise bad(
            "data_sources",
            "names too many sources, or one without a name or with too long a one",
            f"give at most {MAX_SOURCES} of 1 to {MAX_SOURCE_NAME} characters",
        )
    for field in ("license", "data_statement"):
        if len(getattr(spec, field)) > MAX_TEXT:
            raise bad(field, f"is longer than {MAX_TEXT} characters", "link to the long text instead")


def _check_enrolment(spec: RunSpec) -> None:
    policy = spec.enrolment
    if policy.mode == "open" and policy.allowed:
        raise bad(
            "enrolment.allowed", "names keys, but the mode is open", "choose allow-list or invite, or leave it out"
        )
    if policy.mode == "allow-list" and not policy.allowed:
        raise bad("enrolment.allowed", "is empty", "an allow-list of nobody lets nobody in; name keys or choose invite")
    if len(policy.allowed) > MAX_ALLOWED:
        raise bad("enrolment.allowed", f"names {len(policy.allowed)} keys", f"up to {MAX_ALLOWED}; use invites beyond")
    for key in policy.allowed:
        if not is_public_key(key):
            raise bad(
                "enrolment.allowed", f"holds {key[:80]!r}", "give public keys (U…) as `connito miner init` prints"
            )
    if policy.max_miners and policy.max_miners < spec.windows.min_miners:
        raise bad("enrolment.max_miners", "is below windows.min_miners", "raise it, or the run can never start")


def _check_artifacts(spec: RunSpec) -> None:
    check_ref("base.manifest", spec.base.manifest, REALM_PUBLIC)
    _check_corpus("probe", spec.probe, REALM_PUBLIC, REALM_HOLDOUT)
    _check_corpus("train", spec.train, REALM_PUBLIC)
    _check_corpus("holdout", spec.holdout, REALM_HOLDOUT)
    if spec.HasField("replay"):
        _check_corpus("replay", spec.replay, REALM_PUBLIC)
    for index, corpus in enumerate(spec.beside):
        _check_corpus(f"beside[{index}]", corpus, REALM_PUBLIC, REALM_HOLDOUT)
    together = [spec.domain, *(corpus.domain for corpus in spec.beside)]
    if len(set(together)) != len(together):
        raise bad("beside", "names a domain twice, or the target's own", "give each further domain once")
    if not spec.general_holdouts:
        raise bad("general_holdouts", "is empty", "give at least one, or forgetting could not be measured")
    for field, corpora in (("general_holdouts", spec.general_holdouts), ("benchmarks", spec.benchmarks)):
        for index, corpus in enumerate(corpora):
            _check_corpus(f"{field}[{index}]", corpus, REALM_HOLDOUT)
    if spec.holdout.domain != spec.domain:
        raise bad("holdout.domain", f"is {spec.holdout.domain!r}", f"it has to be the run's domain, {spec.domain!r}")
    domains = [spec.domain, *(corpus.domain for corpus in spec.general_holdouts)]
    if len(set(domains)) != len(domains):
        raise bad("general_holdouts", "names a domain twice, or the target's own", "give each general domain once")


def _check_corpus(field: str, corpus: CorpusRef, *realms: Realm.ValueType) -> None:
    check_token(corpus.domain, f"{field}.domain")
    check_ref(f"{field}.artifact", corpus.artifact, *realms)


def check_ref(field: str, ref: ArtifactRef, *realms: Realm.ValueType) -> None:
    """Raise `Invalid` unless `ref` is a content address in one of `realms`."""
    if not re.fullmatch(r"[0-9a-f]{64}", ref.digest):
        raise bad(
            f"{field}.digest", f"is {ref.digest!r}", "put the artifact into the store and give its SHA-256 in hex"
        )
    if ref.size <= 0:
        raise bad(f"{field}.size", f"is {ref.size}", "give the object's length in bytes")
    if ref.realm not in realms:
        allowed = " or ".join(Realm.Name(realm) for realm in realms)
        raise bad(f"{field}.realm", f"is {name_of(Realm, ref.realm)}", f"it has to be {allowed}")


def _check_range(spec: RunSpec, path: str, limits: _Range) -> None:
    value = float(_read(spec, path))  # type: ignore[arg-type]
    if not (math.isfinite(value) and limits.low <= value <= limits.high):
        raise bad(path, f"is {value:g}", f"choose {limits.low:g} to {limits.high:g}")


def _read(spec: RunSpec, path: str) -> object:
    policy, name = path.split(".")
    return getattr(getattr(spec, policy), name)


def _write(spec: RunSpec, path: str, value: object) -> None:
    policy, name = path.split(".")
    setattr(getattr(spec, policy), name, value)

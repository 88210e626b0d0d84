"""Defaults and limits of every run policy, one row a field. The meaning of fields is in proto/connito/v1/run.proto.

A policy that is left out altogether takes every default. In one that is given, a zero means "default" where zero makes
no sense (a learning rate) and means zero where it does (a weight decay).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from connito.protocol.findings import PROTOCOL_VERSION
from connito.protocol.policy import choices
from connito.protocol.scoring import payout
from connito.v1.run_pb2 import RunSpec

MAX_CYCLES = 1000
# Units above this cannot be shared out exactly.
MAX_EMISSION = 1 << 53
MAX_SOURCES, MAX_SOURCE_NAME = 100, 200
# Corpora of one kind.
MAX_CORPORA = 256
MAX_TEXT = 4000
# What a miner reads in one cycle: each part within its limits, the product of all could be no machine's, and whoever takes part
# in the run, or judges it, holds that text in memory.
MAX_CYCLE_TOKENS, MAX_CYCLE_SEQUENCES = 1 << 30, 1 << 22
MAX_RANKS = 10_000
MAX_ALLOWED = 10_000
# What a selection's report holds, since diagnostics by domain and exact statistics.
REPORT_VERSION = 1
# Share of a cycle's steps with a miner's own router, where there is one and no share is given.
DISTILLATION_SHARE = 0.5


@dataclass(frozen=True)
class Number:
    """Default and limits of a number. `zero` says that 0 is a value of its own and takes no default."""

    default: float
    low: float
    high: float
    zero: bool = False


@dataclass(frozen=True)
class Choice:
    """Default and choices of a word."""

    default: str
    choices: tuple[str, ...]


LAW: Mapping[str, Number | Choice] = {
    "selection.method": Choice(choices.METHOD, tuple(choices.METHODS)),
    # 0 here: each method has its own, see `choices.METHODS`.
    "selection.threshold": Number(0, 1e-6, 1),
    "selection.max_experts": Number(0, 0, 1_000_000, zero=True),
    "selection.max_bytes": Number(0, 0, 1 << 50, zero=True),
    "selection.helpers_per_layer": Number(2, 0, 4096, zero=True),
    "selection.max_vram": Number(0, 0, 1 << 50, zero=True),
    "selection.scope": Choice(choices.SCOPE, choices.SCOPES),
    "selection.contested": Choice(choices.CONTESTED_RULE, choices.CONTESTED),
    "selection.causal_effects": Number(4, 0, 4096, zero=True),
    "selection.helper_max_bytes": Number(0, 0, 1 << 50, zero=True),
    "selection.resident_max_bytes": Number(0, 0, 1 << 50, zero=True),
    "training.local_steps": Number(10, 1, 100_000),
    "training.sequence_length": Number(128, 4, 1 << 20),
    "training.batch_sequences": Number(4, 1, 65_536),
    "training.learning_rate": Number(2e-4, 1e-9, 1),
    "training.weight_decay": Number(0.01, 0, 1, zero=True),
    "training.routing_mode": Choice("natural", choices.ROUTING_MODES),
    "training.replay_share": Number(0, 0, 0.9, zero=True),
    "training.moments": Choice("second", choices.MOMENTS),
    "training.final_rate_share": Number(0, 0, 1, zero=True),
    "training.warmup_steps": Number(0, 0, 100_000, zero=True),
    "training.router_distillation": Number(0, 0, 1000, zero=True),
    "training.distillation_share": Number(0, 0, 1, zero=True),
    "training.beta1": Number(0.5, 0, 0.999, zero=True),
    "training.optimizer": Choice(choices.ADAMW, choices.INNER_OPTIMIZERS),
    "training.codec": Choice(choices.CODECS[0], choices.CODECS),
    "training.codec_rank": Number(16, 1, 256),
    "training.codec_share": Number(0.01, 1 / 4096, 1),
    "scoring.target_sequences": Number(32, 1, 1_000_000),
    "scoring.general_sequences": Number(16, 1, 1_000_000),
    "scoring.confidence": Number(0.95, 0.5, 0.9999),
    "scoring.retention_margin": Number(0.02, 0, 10, zero=True),
    "scoring.copy_threshold": Number(0.95, 0.1, 1),
    "scoring.paid_ranks": Number(10, 1, 1_000_000),
    "scoring.max_relative_norm": Number(0.5, 1e-6, 100),
    "scoring.validators_per_submission": Number(0, 0, 1_000, zero=True),
    "scoring.minimum_sequences": Number(0, 0, 1_000_000, zero=True),
    "scoring.copy_span_threshold": Number(0.95, 0.1, 1),
    "scoring.copy_effect_threshold": Number(0.08, 1e-6, 1),
    "merging.aggregator": Choice("mean", choices.AGGREGATORS),
    "merging.weighting": Choice("tokens", choices.WEIGHTINGS),
    # A lie moves one merge a little and is paid nothing; found out, it costs a cycle.
    "merging.checked_claims": Number(0.25, 0, 1, zero=True),
    "merging.step_codec": Choice(choices.STEP_CODECS[0], choices.STEP_CODECS),
    "merging.outer_learning_rate": Number(0.7, 1e-6, 10),
    "merging.outer_momentum": Number(0.9, 0, 0.999, zero=True),
    "merging.gate_target_sequences": Number(32, 1, 1_000_000),
    "merging.gate_general_sequences": Number(16, 1, 1_000_000),
    "merging.gate_target_margin": Number(0.01, 0, 10, zero=True),
    "merging.gate_general_margin": Number(0.01, 0, 10, zero=True),
    "merging.gate_general_drift": Number(0.1, 0, 10, zero=True),
    "merging.report_target_sequences": Number(32, 1, 1_000_000),
    "merging.report_general_sequences": Number(16, 1, 1_000_000),
    "windows.min_miners": Number(1, 1, 10_000),
    "windows.min_validators": Number(1, 1, 1_000),
    "windows.floor_seconds": Number(10, 0.05, 86_400),
    "windows.ceiling_seconds": Number(1800, 0.1, 604_800),
    "windows.assemble_seconds": Number(900, 0.1, 604_800),
    "rewards.validator_share": Number(0, 0, 0.9, zero=True),
    # Yuma's rate.
    "rewards.bond_rate": Number(0.1, 0, 1, zero=True),
    # A new key is one more miner, so that a stranger is not punished for being one; see the trust model.
    "rewards.probation_cycles": Number(0, 0, 1_000, zero=True),
    "rewards.probation_pay": Number(0.5, 0, 1, zero=True),
    "rewards.newcomers_per_cycle": Number(0, 0, 1_000_000, zero=True),
    "enrolment.mode": Choice("open", choices.ENROLMENT),
    "enrolment.max_miners": Number(0, 0, 100_000, zero=True),
    # Without a bound, one key would fill the work queue of all runs.
    "enrolment.messages_per_cycle": Number(16, 1, 256),
    # A submission may be one cycle late, and is measured on the state that it began from.
    "retention.cycles": Number(0, 2, MAX_CYCLES, zero=True),
    "objective.improvement": Number(0, 0, 100, zero=True),
}


def number(path: str) -> Number:
    """Return the limits of a number of the law."""
    found = LAW[path]
    assert isinstance(found, Number)
    return found


def choice(path: str) -> Choice:
    """Return the choices of a word of the law."""
    found = LAW[path]
    assert isinstance(found, Choice)
    return found


def read(spec: RunSpec, path: str) -> float | str:
    """Return the field `policy.name` of a spec."""
    policy, name = path.split(".")
    value: float | str = getattr(getattr(spec, policy), name)
    return value


def write(spec: RunSpec, path: str, value: float | str) -> None:
    """Set the field `policy.name` of a spec."""
    policy, name = path.split(".")
    setattr(getattr(spec, policy), name, value)


def _defaults() -> RunSpec:
    spec = RunSpec(emission=1_000_000)
    for path, rule in LAW.items():
        if rule.default:
            write(spec, path, rule.default)
    spec.rewards.payout = payout.DEFAULT
    return spec


# The platform's policies. `selection.threshold` is left open, as it follows from the method.
DEFAULTS = _defaults()


def fill(spec: RunSpec, customer: str = "") -> None:
    """Write every default into a spec, where the field is left out."""
    for policy, _ in DEFAULTS.ListFields():
        if policy.message_type is not None and not spec.HasField(policy.name):  # type: ignore[arg-type]
            getattr(spec, policy.name).CopyFrom(getattr(DEFAULTS, policy.name))
    for path, rule in LAW.items():
        section, name = path.split(".")
        if left_out(getattr(spec, section), name, rule):
            write(spec, path, rule.default)
    if spec.selection.threshold == 0:
        spec.selection.threshold = choices.METHODS.get(spec.selection.method, choices.METHODS[choices.METHOD])
    if spec.training.router_distillation > 0 and spec.training.distillation_share == 0:
        spec.training.distillation_share = DISTILLATION_SHARE
    spec.rewards.payout = spec.rewards.payout or payout.DEFAULT
    spec.selection.report_version = REPORT_VERSION
    spec.protocol_version = PROTOCOL_VERSION
    spec.emission = spec.emission or DEFAULTS.emission
    spec.customer = spec.customer or customer


def left_out(policy: Message, name: str, rule: Number | Choice) -> bool:
    """Return whether a field takes its default: absent where the schema tells that from 0, else 0 where 0 is no value."""
    if policy.DESCRIPTOR.fields_by_name[name].has_presence:
        return not policy.HasField(name)
    return not getattr(policy, name) and not (isinstance(rule, Number) and rule.zero)

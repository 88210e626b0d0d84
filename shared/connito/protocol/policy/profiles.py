"""Profiles: named overlays over the platform's policies, and single fields that are set by hand.

A profile says only what differs. `laptop` and `tiny` are what `connito up` runs with; a job takes one of them only by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message

from connito.errors import Invalid
from connito.protocol.policy.law import DEFAULTS, LAW, Choice, Number, left_out, write
from connito.render.formats import SHOWN, shown
from connito.v1 import reasons_pb2
from connito.v1.run_pb2 import RunSpec

PLATFORM = "platform"
PROFILES: Mapping[str, Mapping[str, float]] = {
    PLATFORM: {},
    # Three miners and three validators on two cores, a cycle in two minutes: a step of 512 tokens through SmolLM2 takes 2 s,
    # and forgetting is looked at on one sequence a domain, which has no interval: it can be shown, but refuse nobody.
    "laptop": {
        "selection.threshold": 0.5,
        "training.local_steps": 8,
        "training.sequence_length": 256,
        "training.batch_sequences": 2,
        "training.weight_decay": 0,
        "scoring.target_sequences": 8,
        "scoring.general_sequences": 1,
        "scoring.minimum_sequences": 4,
        "merging.gate_target_sequences": 8,
        "merging.gate_general_sequences": 1,
        "merging.gate_general_margin": 0.02,
        "merging.gate_general_drift": 0.2,
        "merging.report_target_sequences": 12,
        "merging.report_general_sequences": 2,
        "windows.floor_seconds": 20,
        "windows.ceiling_seconds": 900,
        "windows.assemble_seconds": 300,
    },
    # A base of a few thousand parameters, for tests: a cycle takes seconds.
    "tiny": {
        "selection.threshold": 0.5,
        "training.local_steps": 8,
        "training.sequence_length": 64,
        "training.learning_rate": 2e-3,
        "training.weight_decay": 0,
        # Over a few short cycles outer momentum has hardly built up; with less, an honest miner can stay below significance.
        "training.beta1": 0.9,
        "scoring.general_sequences": 8,
        "scoring.confidence": 0.99,
        "scoring.retention_margin": 0.05,
        "scoring.max_relative_norm": 1.0,
        "merging.gate_target_sequences": 16,
        "merging.gate_general_sequences": 8,
        "merging.gate_general_margin": 0.05,
        "merging.gate_general_drift": 0.5,
        "merging.report_target_sequences": 16,
        "merging.report_general_sequences": 8,
        "windows.floor_seconds": 20,
        "windows.ceiling_seconds": 30,
        "windows.assemble_seconds": 60,
    },
}
# Policies of which single fields may be set; the others have words of their own in a job.
SETTABLE = ("selection", "training", "scoring", "merging", "windows", "rewards", "retention")


def policies(profile: str = PLATFORM) -> RunSpec:
    """Return a spec with the platform's policies and the profile's over them. Raises `Invalid` for an unknown profile."""
    if profile not in PROFILES:
        raise _bad(f"there is no profile {profile!r}; choose one of {', '.join(PROFILES)}")
    spec = RunSpec()
    spec.CopyFrom(DEFAULTS)
    for path, value in PROFILES[profile].items():
        write(spec, path, value)
    return spec


def override(spec: RunSpec, path: str, value: object) -> None:
    """Set the field SECTION.FIELD; text is read as protobuf's JSON reads it.

    Raises `Invalid` for a field that does not exist, a value of another type, and an empty one or a 0 for which the
    default would be taken.
    """
    policy, name = _find(spec, path)
    rule = LAW.get(f"{path.partition('.')[0]}.{name}")
    try:
        ParseDict({name: value}, policy)
    except (ParseError, ValueError, OverflowError, RecursionError) as error:
        raise _bad(f"{path} cannot be {shown(value)}; {_choose(policy, name, rule)}") from error
    if value is None or (rule is not None and rule.default and left_out(policy, name, rule)):
        raise _bad(f"{path} cannot be {shown(value)}; {_choose(policy, name, rule)}")


def override_text(spec: RunSpec, text: str) -> None:
    """Set a field by `SECTION.FIELD=VALUE`; several values are separated by commas. Raises as `override` does."""
    path, _, given = (part.strip() for part in text.partition("="))
    if not given:
        raise _bad(f"{shown(text)} is not SECTION.FIELD=VALUE, for example training.local_steps=5")
    policy, name = _find(spec, path)
    if policy.DESCRIPTOR.fields_by_name[name].is_repeated:
        override(spec, path, given.split(","))
    else:
        override(spec, path, {"true": True, "false": False}.get(given, given))


def _find(spec: RunSpec, path: str) -> tuple[Message, str]:
    section, _, name = path.partition(".")
    if section not in SETTABLE:
        raise _bad(f"{path[:SHOWN]}: policies have no section {section[:SHOWN]!r}; there are {', '.join(SETTABLE)}")
    policy: Message = getattr(spec, section)
    known = policy.DESCRIPTOR.fields_by_name
    field = known.get(name) or policy.DESCRIPTOR.fields_by_camelcase_name.get(name)
    if field is None:
        raise _bad(f"{path[:SHOWN]}: {section} has no field {name[:SHOWN]!r}; it has {', '.join(sorted(known))}")
    return policy, field.name


def _choose(policy: Message, name: str, rule: Number | Choice | None) -> str:
    """Return what a field can be, for who set something else."""
    field = policy.DESCRIPTOR.fields_by_name[name]
    whole = field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64)
    if isinstance(rule, Choice):
        return f"choose one of {', '.join(rule.choices)}"
    if isinstance(rule, Number) and whole:
        return f"choose a whole number from {rule.low:,} to {rule.high:,}"
    if isinstance(rule, Number):
        return f"choose {rule.low:g} to {rule.high:g}"
    if field.is_repeated:
        return "give a list of whole numbers"
    return "give a word" if field.cpp_type == field.CPPTYPE_STRING else "choose true or false"


def _bad(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_BAD_SPEC)

"""Profiles: named overlays over the platform's policies, and single fields that are set by hand.

A profile says only what differs. `laptop` and `tiny` are what `connito up` runs with; a job takes one of them only by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.json_format import ParseDict, ParseError

from connito.errors import Invalid
from connito.protocol.policy.law import DEFAULTS, write
from connito.v1 import reasons_pb2
from connito.v1.run_pb2 import RunSpec

PLATFORM = "platform"
PROFILES: Mapping[str, Mapping[str, float]] = {
    PLATFORM: {},
    # Three miners and three validators on two cores, a cycle in two minutes: a step of 512 tokens through SmolLM2 takes 2 s,
    # and forgetting is looked at on one sequence a domain, which has no interval: it can be shown, but refuse nobody.
    "laptop": {
        "selection.threshold": 0.5,
        "training.local_steps": 6,
        "training.sequence_length": 256,
        "training.batch_sequences": 2,
        "training.weight_decay": 0,
        "scoring.target_sequences": 8,
        "scoring.general_sequences": 1,
        "merging.gate_target_sequences": 8,
        "merging.gate_general_sequences": 1,
        "merging.gate_general_margin": 0.02,
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
        "scoring.target_sequences": 16,
        "scoring.general_sequences": 8,
        "scoring.confidence": 0.99,
        "scoring.retention_margin": 0.05,
        "scoring.max_relative_norm": 1.0,
        "merging.gate_target_sequences": 16,
        "merging.gate_general_sequences": 8,
        "merging.gate_general_margin": 0.05,
        "merging.report_target_sequences": 16,
        "merging.report_general_sequences": 8,
        "windows.floor_seconds": 20,
        "windows.ceiling_seconds": 30,
        "windows.assemble_seconds": 60,
    },
}
# Policies of which single fields may be set; the others have words of their own in a job.
SETTABLE = ("selection", "training", "scoring", "merging", "windows", "rewards")


def policies(profile: str = PLATFORM) -> RunSpec:
    """Return a spec with the platform's policies and the profile's over them. Raises `Invalid` for an unknown profile."""
    if profile not in PROFILES:
        raise _bad(f"there is no profile {profile!r}; choose one of {', '.join(PROFILES)}")
    spec = RunSpec()
    spec.CopyFrom(DEFAULTS)
    for path, value in PROFILES[profile].items():
        write(spec, path, value)
    return spec


def override(spec: RunSpec, path: str, value: object, shown: str = "") -> None:
    """Set the field SECTION.FIELD, which an error calls `shown`; text is read as protobuf's JSON reads it.

    Raises `Invalid` for a field that does not exist, or a value of another type.
    """
    section, _, name = path.partition(".")
    shown = shown or f"{path}={value}"
    if section not in SETTABLE or not name:
        raise _bad(f"{shown!r} is not SECTION.FIELD=VALUE with a section of {', '.join(SETTABLE)}")
    policy = getattr(spec, section)
    try:
        ParseDict({name: value}, policy)
    except ParseError as error:
        known = ", ".join(sorted(policy.DESCRIPTOR.fields_by_name))
        raise _bad(f"{shown!r} does not fit {section} ({error}); its fields: {known}") from error


def override_text(spec: RunSpec, text: str) -> None:
    """Set a field by `SECTION.FIELD=VALUE`; several values are separated by commas. Raises as `override` does."""
    path, _, given = (part.strip() for part in text.partition("="))
    section, _, name = path.partition(".")
    known = getattr(spec, section).DESCRIPTOR.fields_by_name.get(name) if section in SETTABLE and given else None
    if known is None:
        override(spec, path if given else "", given, text)
    elif known.is_repeated:
        override(spec, path, given.split(","), text)
    else:
        override(spec, path, {"true": True, "false": False}.get(given, given), text)


def _bad(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_BAD_SPEC)

"""What a check says about a job: one sentence a finding, with the numbers it stands on and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

LEVELS = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. An error keeps the job from being submitted, a warning does not."""

    check: str
    level: str
    detail: str
    remedy: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "check": self.check, "level": self.level, "detail": self.detail, "remedy": self.remedy,
            "numbers": dict(self.numbers),
        }  # fmt: skip


def worst(findings: Iterable[Finding]) -> str:
    """The gravest level among them; `ok` without any."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def require(findings: Iterable[Finding], what: str = "the job") -> None:
    """Raise `Invalid` (BAD_SPEC) that names every error among the findings with its remedy."""
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        lines = [f"  {finding.check}: {finding.detail}; {finding.remedy}" for finding in errors]
        raise Invalid(
            "\n".join([f"{what} has {len(errors)} problem{'s' if len(errors) > 1 else ''}:", *lines]),
            reason=reasons.REASON_BAD_SPEC,
        )

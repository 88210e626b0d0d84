"""Findings of a check: a sentence each, with the numbers behind it and a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from connito.errors import Invalid
from connito.render import formats
from connito.v1 import reasons_pb2 as reasons

LEVELS = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """Result of one check. An error keeps the job from being submitted, a warning does not."""

    check: str
    level: str
    detail: str
    remedy: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain data."""
        return {**vars(self), "numbers": dict(self.numbers)}


def listed(findings: Iterable[Finding]) -> str:
    """Return one line a finding, gravest last, so that it is what stays on the screen."""
    marks = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}
    lines = []
    for finding in sorted(findings, key=lambda finding: LEVELS.index(finding.level)):
        lines.append(f"{marks[finding.level]}  {finding.check:<13} {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<23} → {finding.remedy}")
    return "\n".join(lines)


def worst(findings: Iterable[Finding]) -> str:
    """Return the most severe level of the findings; `ok` without any."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def require(findings: Iterable[Finding], what: str = "the job", *, shown: bool = False) -> None:
    """Raise `Invalid` (BAD_SPEC) that names every error among the findings with its remedy; `shown`: which were printed."""
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        said = f"{what} has {formats.count(len(errors), 'problem')}:"
        if shown:
            raise Invalid(f"{said} {', '.join(finding.check for finding in errors)}", reason=reasons.REASON_BAD_SPEC)
        lines = [f"  {finding.check}: {finding.detail}; {finding.remedy}" for finding in errors]
        raise Invalid("\n".join([said, *lines]), reason=reasons.REASON_BAD_SPEC)

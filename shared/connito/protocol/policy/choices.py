"""Choices of policies, and the default where more than the law needs it.

Imports nothing of the project: whoever implements a choice reads it here, and so does the command line.
"""

from __future__ import annotations

from collections.abc import Iterable

# Ways of selecting experts, with the threshold p that each takes when none is given; see docs/explanation/selection.md.
METHODS = {"esft-token": 0.2, "esft-gate": 0.1, "differential": 0.5, "des-moe": 0.6}
METHOD = "esft-token"
SCOPES, SCOPE = ("global", "layer"), "global"
CONTESTED, CONTESTED_RULE = ("share", "duplicate", "exclusive"), "share"
ROUTING_MODES = ("natural", "masked", "restricted")
MOMENTS = ("fresh", "kept", "second")
# Of local steps.
ADAMW, MUON = INNER_OPTIMIZERS = ("adamw", "muon")
# Forms of a submission, see docs/adr/0030-submissions-in-a-coded-form.md.
ROWS = "rows"
# Those that leave out whole directions, and not only the rounding of each number.
SPARSE = ("low-rank", "top-k")
CODECS = ("ternary", "int4", "int8", *SPARSE, ROWS)
# Of the outer step: what leaves out whole directions would leave them out for everybody.
STEP_CODECS = ("int4", "int8", "ternary", ROWS)
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
# What decides a share of the merge, see `connito.protocol.claims`.
WEIGHTINGS = WHOLE, TOKENS, CAPPED = "whole", "tokens", "capped"
ENROLMENT = ("open", "allow-list", "invite")

# No policy: how a miner misbehaves in a drill, see `services.trainer.adversary`.
ADVERSARIES = (
    "copier", "noisy-copier", "masked-copier", "scaled-copier", "mixed-copier", "freerider", "noise", "sign-flip",
    "large-norm", "nan", "oversized", "late",
)  # fmt: skip


def one_of(words: Iterable[str]) -> str:
    """Return `a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}"

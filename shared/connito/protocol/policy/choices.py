"""The words that a policy may say, and the default where more than the law needs it.

Imports nothing: whoever implements a choice reads it here, and so does the command line.
"""

from __future__ import annotations

# Ways of selecting experts, with the threshold p that each takes when none is given; see docs/explanation/selection.md.
METHODS = {"esft-token": 0.2, "esft-gate": 0.1, "differential": 0.5, "des-moe": 0.6}
METHOD = "esft-token"
SCOPES, SCOPE = ("global", "layer"), "global"
CONTESTED, CONTESTED_RULE = ("share", "duplicate", "exclusive"), "share"
ROUTING_MODES = ("natural", "masked", "restricted")
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
ENROLMENT = ("open", "allow-list", "invite")

"""What a policy that is a word may say. Imports nothing, so that whoever implements a choice can read it here."""

from __future__ import annotations

# Ways of selecting experts, with the threshold p that each takes when none is given; see docs/explanation/selection.md.
METHODS = {"esft-token": 0.2, "esft-gate": 0.1, "differential": 0.5, "des-moe": 0.6}
SCOPES = ("global", "layer")
CONTESTED = ("share", "duplicate", "exclusive")
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

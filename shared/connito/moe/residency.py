"""Experts that a miner holds beside the targets, and in which precision. No torch here.

all        every frozen expert as it is stored: the training model is the full model
four-bit   every frozen expert in four bits (`connito.moe.four_bit`), those of layers without a target too: each token goes
           where the router sends it, to an expert that is a little off
helpers    the few that the run's selection names, for a machine that cannot hold all; where it cannot either, refused
"""

from __future__ import annotations

from dataclasses import dataclass

AUTO = "auto"
ALL, FOUR_BIT, HELPERS = "all", "four-bit", "helpers"

# How the rows of an adapted layer are called in its experts module.
TARGET, HELPER, BACKGROUND = "target_", "helper_", "background_"

# Values under one scale, and scales under one outer scale.
BLOCK, BLOCKS = 64, 256


@dataclass(frozen=True)
class Residents:
    """Experts of one layer that are in memory, both lists ascending; `background`: one merged expert stands for the rest.

    With residency `all` the rows of the helpers are the layer's whole bank, expert e in row e.
    """

    targets: tuple[int, ...]
    helpers: tuple[int, ...]
    num_experts: int
    background: bool = False
    residency: str = HELPERS

    def where(self) -> list[tuple[int, int, str, int]]:
        """Return (expert id, its place among the rows of all banks, prefix of its bank, its row there), ascending by id, as a
        full model would visit them.

        The background expert has the id of the skip slot, N: whoever would be skipped goes to it.
        """
        count, beside = len(self.targets), self.num_experts if self.residency == ALL else len(self.helpers)
        found = [(e, i, TARGET, i) for i, e in enumerate(self.targets)]
        for i, e in enumerate(self.helpers):
            row = e if self.residency == ALL else i
            found.append((e, count + row, HELPER, row))
        return sorted(found) + ([(self.num_experts, count + beside, BACKGROUND, 0)] if self.background else [])

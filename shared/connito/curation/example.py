"""Search by example: rank experts by the loss they save on given texts. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from connito.base.loading import load_full, load_tokenizer
from connito.curation.holdings import Holdings
from connito.curation.texts import cut_sequences
from connito.errors import Invalid
from connito.experts.compose import Part, read_part
from connito.experts.load import check_base
from connito.experts.predict import measure_savings, nearest_experts, predict_savings
from connito.library.artifact import EXPERT_FILE
from connito.library.hits import Hit, Ranked, rank
from connito.moe.device import device_of
from connito.moe.rows import base_digests, fingerprint
from connito.render import formats
from connito.runtime.progress import tell

if TYPE_CHECKING:
    from torch import nn

# By signature alone, this many candidates are kept; only these are fetched and differentiated.
CONSIDERED = 50


def rank_by_example(
    hits: Sequence[Hit], base: Path, texts: Sequence[Path], count: int, library: Holdings
) -> list[Ranked]:
    """Predict what every hit saves on the texts, and measure the `count` best. Raises as `Holdings.find`."""
    model, sequences = load_full(base, device=device_of()), cut_sequences(load_tokenizer(base), texts)
    digests, parts = fingerprint(model), dict[str, Part]()
    if len(hits) > CONSIDERED:
        near = nearest_experts(model, {hit.expert_id: hit.record for hit in hits}, sequences)[:CONSIDERED]
        hits = [hit for hit in hits if hit.expert_id in set(near)]
    for hit in hits:
        folder = library.find(hit.expert_id)[0]
        if not (folder / EXPERT_FILE).is_file():
            continue  # A whole model is not put into the base.
        part = read_part(folder)
        if _fits(model, part, digests):
            parts[hit.expert_id] = replace(part, name=hit.expert_id)
    tell(f"predicting the gain of {formats.count(len(parts), 'expert')}")
    predicted = predict_savings(model, list(parts.values()), sequences)
    best = sorted(predicted, key=lambda name: (-predicted[name], name))[:count]
    tell(f"measuring the best {len(best)}")
    return rank(hits, predicted, measure_savings(model, [parts[name] for name in best], sequences))


def _fits(model: nn.Module, part: Part, digests: dict[str, str]) -> bool:
    """Tell whether the expert was made for this base."""
    assert part.header is not None
    try:
        check_base(part.header, base_digests(model, part.header.layers, digests))
    except Invalid:
        return False
    return True

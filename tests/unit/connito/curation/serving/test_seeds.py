"""The chances of a draw with a seed are the model's."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from connito.curation.serving.generation import _TopP
from transformers import TopPLogitsWarper


def test_seeds_draw_by_the_chances_and_others_rows_are_left() -> None:
    count, free = 4000, 7
    processor = _TopP(TopPLogitsWarper(0.5))
    processor.seeds = {str(number): f"{number}" for number in range(count)} | {str(free): ""}
    states = [
        SimpleNamespace(request_id=str(n), generated_tokens=[], logit_processor_kwargs={"top_p": 1.0})
        for n in range(count)
    ]
    arguments = processor.prepare_tensor_args([SimpleNamespace(state=state) for state in states])
    chances = torch.tensor([0.5, 0.0, 0.3, 0.2])
    scores = chances.log().repeat(count, 1)
    drawn = processor(scores.clone(), arguments).softmax(1)
    assert torch.equal(drawn[free], scores[free].softmax(0)), "without a seed the library draws"
    rows = torch.cat([drawn[:free], drawn[free + 1 :]])
    assert {entry for row in rows.tolist() for entry in row} == {0.0, 1.0}
    # Five standard deviations of a share of 0.5 among so many.
    assert (rows.mean(0) - chances).abs().max() < 5 * 0.5 / count**0.5

"""Claims of routed tokens are strangers' words: what is a claim, which are counted again, and what is false."""

from __future__ import annotations

import json

import numpy as np
import pytest
from connito.data.tensors import Header, TensorEntry
from connito.errors import Invalid
from connito.protocol.claims import claim_of, claimed_rows, falsehood, metadata_of
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.views.sentences import sentence

CLAIM = {2: [10, 0, 400], 7: [4096, 5]}
SELECTION = run_pb2.SelectionMade(
    layers=[run_pb2.LayerSelection(layer=2, per_token=2), run_pb2.LayerSelection(layer=7, per_token=2)]
)


def spec(weighting: str = "tokens") -> run_pb2.RunSpec:
    return run_pb2.RunSpec(
        merging=run_pb2.MergePolicy(weighting=weighting), training=run_pb2.TrainPolicy(sequence_length=64)
    )


def header(text: str | None) -> Header:
    entries = {
        "layers.2.down_proj": TensorEntry("F32", (3, 4), 0, 48),
        "layers.2.up_proj": TensorEntry("F32", (3, 4), 48, 96),
        "layers.7.down_proj": TensorEntry("F32", (2, 4), 96, 128),
    }
    return Header(entries, {} if text is None else {"routed": text}, 0, 128)


def test_a_claim_comes_back_as_it_was_made() -> None:
    assert claim_of(header(metadata_of(CLAIM)["routed"]), spec(), SELECTION) == CLAIM


def test_nothing_is_claimed_where_nothing_is_said_or_the_run_merges_whole_submissions() -> None:
    assert claim_of(header(None), spec(), SELECTION) is None
    assert claim_of(header("rubbish"), spec("whole"), SELECTION) is None
    assert claim_of(header("rubbish"), spec(""), SELECTION) is None


HOSTILE = {
    "no JSON": "{",
    "a list": "[1, 2]",
    "null": "null",
    "NaN": '{"2":[NaN,0,1],"7":[1,1]}',
    "infinity": '{"2":[Infinity,0,1],"7":[1,1]}',
    "negative": '{"2":[-1,0,1],"7":[1,1]}',
    "huge": '{"2":[1e308,0,1],"7":[1,1]}',
    "more than there are": '{"2":[4097,0,1],"7":[1,1]}',
    "more than the router sends": '{"2":[4096,4096,1],"7":[1,1]}',
    "beyond 64 bits": json.dumps({"2": [10**40, 0, 1], "7": [1, 1]}),
    "more digits than Python reads": '{"2":[' + "9" * 5000 + ',0,1],"7":[1,1]}',
    "a fraction": '{"2":[0.5,0,1],"7":[1,1]}',
    "a boolean": '{"2":[true,0,1],"7":[1,1]}',
    "a text": '{"2":["9",0,1],"7":[1,1]}',
    "too few": '{"2":[1,1],"7":[1,1]}',
    "for experts that are not selected": '{"2":[1,1,1,1],"7":[1,1]}',
    "for a layer that is not selected": '{"2":[1,1,1],"7":[1,1],"9":[1]}',
    "a layer left out": '{"2":[1,1,1]}',
    "layers by another name": '{"02":[1,1,1],"7":[1,1]}',
    "nested without end": "[" * 100_000,
    "long": " " * (1 << 20),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("weighting", ["tokens", "capped"])
def test_hostile_claims_are_refused_by_name(text: str, weighting: str) -> None:
    with pytest.raises(Invalid, match="claim of routed tokens") as refused:
        claim_of(header(text), spec(weighting), SELECTION)
    assert refused.value.reason == reasons_pb2.REASON_BAD_CLAIM
    assert len(str(refused.value)) < 300


def test_a_claim_is_about_the_first_tokens_of_the_batches() -> None:
    batches = np.arange(10 * 8 * 65).reshape(10, 8, 65)
    assert claimed_rows(batches).tolist() == batches.reshape(80, 65)[:64].tolist()
    assert len(claimed_rows(batches[:1, :2])) == 2
    long = np.zeros((2, 2, 8193))
    assert claimed_rows(long).shape == (1, 8193)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ([410, 200, 30], False),  # what rounding in a miner's model may do
        ([400, 200, 30], False),
        ([1000, 200, 30], True),  # inflated
        ([0, 0, 0], True),  # deflated
        ([30, 200, 400], True),  # moved from one expert to another
    ],
)
def test_a_claim_is_false_when_more_than_the_margin_of_the_tokens_differ(claim: list[int], said: bool) -> None:
    found = falsehood({2: claim}, {2: [400, 200, 30]}, 1000)
    assert (found is not None) == said
    if found is not None:
        assert found.kind == cycle_pb2.FINDING_KIND_FALSE_CLAIM
        assert "claim is false: of layers.2" in sentence(found)


def test_layers_above_may_differ_more_as_a_model_with_absent_experts_does() -> None:
    counted = {layer: [500, 100] for layer in range(7)}
    for layer, may in enumerate((100, 200, 300, 400, 500, 500, 500)):
        near, far = ({**counted, layer: [500 + may + more, 100]} for more in (0, 1))
        assert falsehood(near, counted, 1000) is None
        found = falsehood(far, counted, 1000)
        assert found is not None
        assert found.name == f"layers.{layer}"


@pytest.mark.parametrize(
    ("steps", "batch", "length", "tokens"),
    [(2, 3, 64, 384), (100, 8, 64, 4096), (100, 8, 63, 4095), (1, 1, 8192, 8192), (0, 0, 64, 4096)],
)
def test_nobody_claims_more_tokens_than_its_batches_have(steps: int, batch: int, length: int, tokens: int) -> None:
    of = spec()
    of.training.local_steps, of.training.batch_sequences, of.training.sequence_length = steps, batch, length
    batches = np.zeros((steps, batch, length + 1))
    assert not steps or claimed_rows(batches)[:, :-1].size == tokens
    for much, fine in ((tokens, True), (tokens + 1, False)):
        text = json.dumps({"2": [much, 0, 0], "7": [1, 1]})
        if fine:
            assert claim_of(header(text), of, SELECTION)
        else:
            with pytest.raises(Invalid, match="claim of routed tokens"):
                claim_of(header(text), of, SELECTION)


def test_a_selection_of_before_bounds_no_sum() -> None:
    old = run_pb2.SelectionMade(layers=[run_pb2.LayerSelection(layer=2), run_pb2.LayerSelection(layer=7)])
    assert claim_of(header('{"2":[4096,4096,4096],"7":[1,1]}'), spec(), old)

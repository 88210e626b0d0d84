from __future__ import annotations

import numpy as np
import pytest
from connito.errors import Invalid
from connito.protocol.holdout import draw_sequences, split, subsets
from connito.v1 import reasons_pb2, run_pb2
from hypothesis import given
from hypothesis import strategies as st


def sequences(count: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, (count, 9), dtype=np.int32)


def test_the_parts_are_disjoint_and_complete() -> None:
    parts = split(sequences(), gate=12, report=8, needed=10)
    assert [len(parts.score), len(parts.gate), len(parts.report)] == [40, 12, 8]
    assert sorted(parts.score + parts.gate + parts.report) == list(range(60))


def test_the_same_text_is_never_in_two_parts() -> None:
    rows = sequences()
    doubled = np.concatenate([rows, rows])
    parts = split(doubled, gate=12, report=8)
    texts = [{doubled[i].tobytes() for i in part} for part in (parts.score, parts.gate, parts.report)]
    assert len(set().union(*texts)) == sum(map(len, texts)) == len(parts.score + parts.gate + parts.report) == 60


def test_the_split_follows_the_text_and_not_its_place() -> None:
    rows = sequences()
    one, other = split(rows, gate=12, report=8), split(rows[::-1], gate=12, report=8)
    assert {rows[i].tobytes() for i in one.gate} == {rows[::-1][i].tobytes() for i in other.gate}


def test_too_small_a_hold_out_says_what_is_missing() -> None:
    with pytest.raises(Invalid, match=r"of law has 20 different sequences of 8 tokens.*about 90 tokens") as raised:
        split(sequences(20), gate=12, report=8, needed=10, domain="law")
    assert raised.value.reason == reasons_pb2.REASON_BAD_SPEC


def test_policy_has_numbers_for_target_and_general() -> None:
    spec = run_pb2.RunSpec(
        holdout=run_pb2.CorpusRef(domain="law"),
        scoring=run_pb2.ScorePolicy(target_sequences=4, general_sequences=2),
        merging=run_pb2.MergePolicy(
            gate_target_sequences=5, gate_general_sequences=3, report_target_sequences=6, report_general_sequences=1
        ),
    )
    target, general = subsets(sequences(), spec, "law"), subsets(sequences(), spec, "code")
    assert (len(target.gate), len(target.report)) == (5, 6)
    assert (len(general.gate), len(general.report)) == (3, 1)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 30))
def test_a_draw_is_without_replacement_and_repeatable(seed: bytes, count: int) -> None:
    pool = list(range(100, 160, 2))
    drawn = draw_sequences(seed, "law", pool, count)
    assert len(set(drawn)) == count
    assert set(drawn) <= set(pool)
    assert drawn == draw_sequences(seed, "law", pool[::-1], count)


def test_a_draw_depends_on_seed_domain_and_salt_and_is_fair() -> None:
    pool = list(range(40))
    base = draw_sequences(b"s" * 32, "law", pool, 10)
    assert base != draw_sequences(b"t" * 32, "law", pool, 10)
    assert base != draw_sequences(b"s" * 32, "code", pool, 10)
    assert base != draw_sequences(b"s" * 32, "law", pool, 10, "UA")
    hits = np.zeros(40)
    for number in range(2000):
        hits[draw_sequences(number.to_bytes(32, "big"), "law", pool, 10)] += 1
    # 500 expected each, standard deviation 19: five of them is as good as never.
    assert np.abs(hits - 500).max() < 97


def test_drawing_more_than_there_is_is_refused() -> None:
    with pytest.raises(Invalid, match="cannot draw 3 of 2"):
        draw_sequences(b"s" * 32, "law", [1, 2], 3)

from __future__ import annotations

from itertools import combinations

import pytest
from connito.protocol.assignment import assign
from hypothesis import given
from hypothesis import strategies as st

SEEDS = st.binary(min_size=32, max_size=32)


@given(seed=SEEDS, miners=st.integers(0, 30), validators=st.integers(1, 12), each=st.integers(0, 14))
def test_everybody_is_scored_often_enough_and_nobody_has_more_to_do_than_another(
    seed: bytes, miners: int, validators: int, each: int
) -> None:
    work, people = [f"M{i}" for i in range(miners)], [f"V{i}" for i in range(validators)]
    dealt = assign(seed, work, people, each)
    assert set(dealt) == set(people)
    per_miner = [sum(miner in duty for duty in dealt.values()) for miner in work]
    assert set(per_miner) <= {min(each or validators, validators)}
    loads = [len(duty) for duty in dealt.values()]
    assert max(loads) - min(loads) <= 1


@given(seed=SEEDS, order=st.permutations(range(9)))
def test_only_the_sets_and_the_seed_decide(seed: bytes, order: list[int]) -> None:
    work, people = [f"M{i}" for i in order], [f"V{i}" for i in order][:6]
    assert assign(seed, work, people, 2) == assign(seed, sorted(work, reverse=True), sorted(people), 2)


@given(seed=SEEDS)
def test_any_two_validators_have_submissions_in_common(seed: bytes) -> None:
    """Of six validators there are fifteen pairs; dealing sixty submissions meets every one of them.

    Thirty, two for each pair, leave one out for about one seed of three thousand.
    """
    dealt = assign(seed, [f"M{i}" for i in range(60)], [f"V{i}" for i in range(6)], 2)
    assert all(dealt[one] & dealt[other] for one, other in combinations(dealt, 2))


def test_before_the_draw_every_validator_is_as_likely_as_another() -> None:
    seen = dict.fromkeys("abcd", 0)
    for number in range(2000):
        dealt = assign(number.to_bytes(32, "big"), ["M0", "M1", "M2"], list("abcd"), 2)
        for validator, duty in dealt.items():
            seen[validator] += "M1" in duty
    # Binomial(2000, ½): six standard deviations are 134.
    assert all(abs(count - 1000) < 134 for count in seen.values())


@pytest.mark.parametrize("each", [0, 4, 9])
def test_everybody_scores_everything_without_a_limit_or_with_one_that_does_not_bind(each: int) -> None:
    assert assign(b"s" * 32, ["A", "B"], list("wxyz"), each) == dict.fromkeys("wxyz", frozenset({"A", "B"}))

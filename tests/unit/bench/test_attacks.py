"""The attack suite names what it tries, and its attacks on messages are refused one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from connito.v1 import reasons_pb2
from connito.wire.enums import reason_name

from bench.attack_kinds import ATTACKS
from bench.attack_messages import replays, withheld, wrong_windows
from bench.attacks import ACCUSATIONS, QUICK, _means, _table

NAMES = [attack.name for attack in ATTACKS]
REASONS = {reason_name(number) for number in reasons_pb2.Reason.values()}


def test_every_kind_of_attack_is_tried() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for kind in (
        "copier", "noisy copier", "scaled copier", "mixed copier", "griefing copier", "free-rider", "random noise",
        "sign flip", "large norm", "backdoor", "overfitter", "sybils", "validators inflates", "validators sinks",
        "oversized", "truncated", "mis-shaped", "header bomb", "overlapping offsets", "duplicate keys",
    ):  # fmt: skip
        assert any(kind in name for name in NAMES), kind


def test_what_is_named_exists() -> None:
    assert set(QUICK) <= set(NAMES)
    assert {reason for attack in ATTACKS for reason in attack.found} | set(ACCUSATIONS) <= REASONS


@pytest.mark.parametrize("trial", [replays, wrong_windows])
def test_messages_are_refused_for_what_is_wrong_with_them(trial: Callable[[bool], dict[str, Any]]) -> None:
    rates = trial(True)
    assert (rates["found"], rates["accused"]) == (1.0, 0.0)
    assert rates["trials"] >= 100


def test_one_who_may_withhold_chooses_between_two_draws_and_no_more() -> None:
    rates = withheld(True)
    # The mean of the larger of two standard normal draws is 0.564; of four it would be 1.03.
    assert 0.4 < rates["model"] < 0.75
    assert 0.4 < rates["seats_lost"] < 0.6


def test_rates_are_shares_of_hand_ins() -> None:
    row = {
        "attack": "a", "world": "IID", "found": [True, False], "unpaid": [True, True], "earned": 10, "honest_earned": 100,
        "accused": [False] * 4, "unrewarded": [False] * 4, "model": 0.01, "general": 0.0, "model_naive": 0.5,
        "general_naive": 0.1,
    }  # fmt: skip
    (entry,) = _table(
        [row, {**row, "found": [True, True], "earned": 30, "accused": [True, False, False, False]}]
    ).values()
    assert (entry["found"], entry["unpaid"], entry["earned"], entry["earned_naive"]) == (0.75, 1.0, 0.2, 2.0)
    assert entry["accused"] == 0.125
    assert _means([row])["model"][0] == 0.01

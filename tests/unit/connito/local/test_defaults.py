from __future__ import annotations

import re

import pytest
from connito.errors import Invalid
from connito.local.defaults import UpOptions, profile


def test_a_policy_can_be_overridden() -> None:
    spec = profile(UpOptions(base="tiny", overrides=("training.local_steps=3", "merging.aggregator=top-1"))).spec
    assert (spec.training.local_steps, spec.merging.aggregator) == (3, "top-1")


def test_rewards_and_assignment_are_policies_too() -> None:
    overrides = (
        "rewards.rank_shares=5,3,2",
        "rewards.payout=proportional",
        "rewards.bond_rate=0",
        "scoring.validators_per_submission=2",
        "scoring.minimum_sequences=4",
    )
    spec = profile(UpOptions(base="tiny", overrides=overrides)).spec
    assert list(spec.rewards.rank_shares) == [5, 3, 2]
    assert (spec.rewards.payout, spec.rewards.bond_rate) == ("proportional", 0)
    assert spec.rewards.HasField("bond_rate")
    assert (spec.scoring.validators_per_submission, spec.scoring.minimum_sequences) == (2, 4)


@pytest.mark.parametrize(
    "override",
    ["training", "base.name=x", "training.steps=3", "training.local_steps=many", "rewards.rank_shares=many,few"],
)
def test_an_override_that_does_not_fit_is_named(override: str) -> None:
    with pytest.raises(Invalid, match=re.escape(override.partition("=")[0])):
        profile(UpOptions(base="tiny", overrides=(override,)))

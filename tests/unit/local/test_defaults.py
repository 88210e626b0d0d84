from __future__ import annotations

import re

import pytest
from connito.errors import Invalid
from connito.local.defaults import Wish, profile


def test_a_policy_can_be_overridden():
    spec = profile(Wish(base="tiny", overrides=("training.local_steps=3", "merging.aggregator=top-1"))).spec
    assert (spec.training.local_steps, spec.merging.aggregator) == (3, "top-1")


@pytest.mark.parametrize("override", ["training", "base.name=x", "training.steps=3", "training.local_steps=many"])
def test_an_override_that_does_not_fit_is_named(override):
    with pytest.raises(Invalid, match=re.escape(override)):
        profile(Wish(base="tiny", overrides=(override,)))

"""The law is stated once: its defaults fit its limits, and no other module lists its choices."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from connito.errors import Invalid
from connito.protocol.policy import choices
from connito.protocol.policy.check import complete
from connito.protocol.policy.law import DEFAULTS, LAW, Choice, Number, read
from connito.protocol.policy.profiles import PROFILES, override, override_text, policies
from connito.v1.run_pb2 import RunSpec

from tests.unit.connito.protocol.test_policy import CUSTOMER, minimal

ROOT = Path(__file__).parents[4]
# Where a choice is implemented, one entry each.
IMPLEMENTED = {"shared/connito/protocol/merging/aggregators.py"}
CHOICES = {frozenset(rule.choices) for rule in LAW.values() if isinstance(rule, Choice)} | {
    frozenset(choices.ADVERSARIES)
}


def listed(tree: ast.AST) -> Iterator[tuple[int, frozenset[str]]]:
    """Line and words of every tuple, list, set and mapping of words."""
    for node in ast.walk(tree):
        items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        words = [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]
        if words and len(words) == len(items):
            yield node.lineno, frozenset(words)  # type: ignore[attr-defined]


def test_nobody_else_lists_the_choices_of_a_policy() -> None:
    found = [
        f"{name}:{line}"
        for path in sorted([*(ROOT / "shared/connito").rglob("*.py"), *(ROOT / "services").rglob("*.py")])
        if (name := str(path.relative_to(ROOT))) not in IMPLEMENTED and path.name != "choices.py"
        for line, words in listed(ast.parse(path.read_text()))
        if words in CHOICES
    ]
    assert found == []


@pytest.mark.parametrize("path", LAW)
def test_a_default_is_within_its_limits(path: str) -> None:
    rule = LAW[path]
    if isinstance(rule, Choice):
        assert rule.default in rule.choices
    elif path != "selection.threshold":
        assert rule.low <= rule.default <= rule.high or (rule.zero and rule.default == 0)
    assert isinstance(rule, Choice) or rule.low < rule.high


@pytest.mark.parametrize("path", [path for path, rule in LAW.items() if isinstance(rule, Number)])
def test_the_limits_of_every_number_hold(path: str) -> None:
    policy, name = path.split(".")
    rule = LAW[path]
    assert isinstance(rule, Number)
    for value in (rule.low - 1, 2 * rule.high + 1):
        asked = minimal()
        try:
            setattr(getattr(asked, policy), name, value)
        except ValueError:  # The wire has no such value.
            continue
        if value or rule.zero:
            with pytest.raises(Invalid, match=path):
                complete(asked, CUSTOMER)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_says_only_what_differs_and_is_within_the_law(name: str) -> None:
    assert [path for path, value in PROFILES[name].items() if read(DEFAULTS, path) == value] == []
    spec = minimal()
    for policy in ("selection", "training", "scoring", "merging", "windows", "rewards"):
        getattr(spec, policy).CopyFrom(getattr(policies(name), policy))
    assert complete(spec, CUSTOMER).training == policies(name).training


def test_text_sets_numbers_words_lists_and_flags() -> None:
    spec = RunSpec()
    for text in ("training.beta1=0", "merging.aggregator=krum", "rewards.rank_shares=5,3", "selection.background=true"):
        override_text(spec, text)
    assert spec.training.HasField("beta1")
    assert (spec.merging.aggregator, list(spec.rewards.rank_shares)) == ("krum", [5, 3])
    assert spec.selection.background


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("foo", "'foo' is not SECTION.FIELD=VALUE, for example training.local_steps=5"),
        ("foo=1", "policies have no section 'foo'; there are selection, training"),
        ("enrolment.mode=invite", "policies have no section 'enrolment'; there are selection"),
        ("training.steps=1", "training has no field 'steps'; it has batch_sequences, beta1"),
        ("training.local_steps=-3", "training.local_steps cannot be '-3'; choose a whole number from 1 to 100,000"),
        ("training.local_steps=1.5", "training.local_steps cannot be '1.5'; choose a whole number from 1 to 100,000"),
        ("training.local_steps=0", "training.local_steps cannot be '0'; choose a whole number from 1 to 100,000"),
        ("training.learning_rate=fast", "training.learning_rate cannot be 'fast'; choose 1e-09 to 1"),
        ("scoring.copy_span_threshold=0", "scoring.copy_span_threshold cannot be '0'; choose 0.1 to 1"),
        ("selection.background=yes", "selection.background cannot be 'yes'; choose true or false"),
        ("rewards.rank_shares=5,many", "rewards.rank_shares cannot be .*; give a list of whole numbers"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_those_that_can(text: str, said: str) -> None:
    with pytest.raises(Invalid, match=said) as caught:
        override_text(RunSpec(), text)
    assert "Message type" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, True, float("nan"), ""])
def test_a_value_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(Invalid, match=r"training\.local_steps cannot be .*; choose a whole number"):
        override(RunSpec(), "training.local_steps", value)
    with pytest.raises(Invalid, match=r"training\.moments cannot be .*; choose one of fresh, kept, second"):
        override(RunSpec(), "training.moments", value)


def test_zero_stands_for_the_method_s_own_threshold() -> None:
    spec = policies("laptop")
    override_text(spec, "selection.threshold=0")
    assert spec.selection.threshold == 0

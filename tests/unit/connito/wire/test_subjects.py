from __future__ import annotations

import pytest
from connito.bus import streams
from connito.errors import Invalid
from connito.wire.subjects import SECTIONS, FactKey, fact, ingress, parse_fact, parse_ingress
from hypothesis import given
from hypothesis import strategies as st

TOKENS = st.from_regex(r"[A-Za-z0-9_-]{1,80}", fullmatch=True)


@given(TOKENS, st.sampled_from(SECTIONS), st.integers(0, 10**6), TOKENS, st.one_of(st.just(""), TOKENS))
def test_a_fact_subject_parses_back_and_has_a_stream(run: str, section: str, cycle: int, kind: str, id_: str) -> None:
    subject = fact(run, section, cycle, kind, id_)
    assert parse_fact(subject) == (run, FactKey(section, cycle, kind, id_))
    assert streams.stream_of(subject) == ("RUNS" if section == "run" else section.upper())


@given(TOKENS, TOKENS, st.sampled_from(["trained", "commitment", "reveal"]))
def test_an_ingress_subject_parses_back_and_has_its_stream(run: str, miner: str, kind: str) -> None:
    subject = ingress(run, miner, kind)
    assert parse_ingress(subject) == (run, miner, kind)
    assert streams.stream_of(subject) == "INGRESS"


@pytest.mark.parametrize("bad", ["", "a.b", "*", ">", "a b", "ü", "x" * 81, "new\nline"])
def test_what_is_not_one_token_can_not_become_a_subject(bad: str) -> None:
    with pytest.raises(Invalid):
        fact(bad, "train", 1, "opened")
    with pytest.raises(Invalid):
        ingress("run", bad, "reveal")
    if bad:
        with pytest.raises(Invalid):
            fact("run", "train", 1, "seed", bad)


@pytest.mark.parametrize(
    "subject",
    ["", "connito.v1.r.train.1", "connito.v1.r.lunch.1.opened", "connito.v2.r.train.1.opened", "connito.v1.r.train.x.opened",
     "connito.v1.r.train.-1.opened", "connito.v1.r.train.1.opened.a.b", "connito.v1.r.ingress.m.reveal"],
)  # fmt: skip
def test_other_subjects_are_not_facts(subject: str) -> None:
    with pytest.raises(Invalid):
        parse_fact(subject)


def test_other_subjects_are_not_ingress() -> None:
    for subject in ("connito.v1.r.train.1.opened", "connito.v1.r.ingress.m", "connito.v1.r.ingress.m.reveal.x"):
        with pytest.raises(Invalid):
            parse_ingress(subject)

from __future__ import annotations

import pytest
from connito.bus import streams
from connito.errors import Invalid
from connito.wire.subjects import fact, ingress
from connito.wire.verification import CATALOGUE


def matches(pattern: str, subject: str) -> bool:
    """NATS wildcards: `*` is one token, a final `>` one or more."""
    wanted, have = pattern.split("."), subject.split(".")
    for position, token in enumerate(wanted):
        if token == ">":
            return len(have) > position
        if position >= len(have) or token not in ("*", have[position]):
            return False
    return len(wanted) == len(have)


def subjects() -> list[str]:
    facts = [fact("r", section, 1, kind, "x" if id_ else "") for (section, kind), (_, _, id_) in CATALOGUE.items()]
    return [*facts, ingress("r", "m", "reveal"), "connito.dlq.v1.INGRESS.7"]


@pytest.mark.parametrize("subject", subjects())
def test_each_subject_is_stored_by_exactly_the_stream_that_is_asked_for_it(subject: str) -> None:
    storing = [stream.name for stream in streams.STREAMS.values() if matches(stream.filter(), subject)]
    assert storing == [streams.stream_of(subject)]


def test_a_filter_for_one_run_leaves_the_others_out() -> None:
    assert matches(streams.STREAMS["TRAIN"].filter("r"), "connito.v1.r.train.1.opened")
    assert not matches(streams.STREAMS["TRAIN"].filter("r"), "connito.v1.s.train.1.opened")


@pytest.mark.parametrize("run", ["../x", "a b", "a.b", ">", "*", "r\n", "ä", "x" * 81])
def test_what_is_no_run_id_filters_nothing(run: str) -> None:
    with pytest.raises(Invalid, match=r"run id .* may hold only letters"):
        streams.STREAMS["TRAIN"].filter(run)


@pytest.mark.parametrize("subject", ["", "other.subject", "connito.v1.r.lunch.1.opened", "connito.v1"])
def test_no_stream(subject: str) -> None:
    with pytest.raises(Invalid, match="no stream"):
        streams.stream_of(subject)


def test_every_durable_reads_a_declared_stream() -> None:
    for durable in streams.DURABLES.values():
        assert durable.stream in streams.STREAMS
    assert streams.DURABLES["committer"].max_ack_pending > 1000, "one key's messages do not fill the queue"

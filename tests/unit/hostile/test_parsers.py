"""Everything that reads what a stranger sends: it answers, or raises one of the taxonomy's errors, and nothing else.

A signature does not help here: a miner may sign whatever it likes.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from connito.bus.streams import stream_of
from connito.data.tensors import MAX_HEADER_BYTES, read_header, tensor_bytes
from connito.errors import ConnitoError, Invalid, Retry
from connito.protocol.submission import expected_layout, validate
from connito.service.rpc import open_request
from connito.store.named import key_of
from connito.v1 import artifacts_pb2, cycle_pb2, services_pb2
from connito.v1.envelope_pb2 import Envelope
from connito.views.sentences import detail_of
from connito.wire.enums import reason_name
from connito.wire.envelope import open_bytes, seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.roster import ROLES, Roster
from connito.wire.subjects import ingress, parse_fact, parse_ingress
from connito.wire.verification import CATALOGUE, INGRESS, verify_fact, verify_ingress
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.committer import judging
from tests.unit.hostile.messages import messages
from tests.unit.services.committer.ledger import RUN, Ledger

MINER = Identity.generate(b"hostile miner".ljust(32, b"."))
SERVICE = Identity.generate(b"hostile service".ljust(32, b"."))
ROSTER = Roster({role: frozenset({SERVICE.public}) for role in ROLES})
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
WORDS = st.sampled_from(
    ["connito", "v1", RUN, "ingress", "commit", "run", "0", "1", "²", "١", "9" * 5000, "*", ">", "", "a b"]
)
SUBJECTS = st.lists(WORDS | st.text(max_size=6), max_size=8).map(".".join) | st.text(max_size=60)


def ledger() -> Ledger:
    """A run in its second cycle, with every window of the first behind it."""
    told = Ledger()
    told.miners(MINER.public)
    for cycle in (1, 2):
        told.opened("train", cycle)
        told.opened("commit", cycle)
        accepted = cycle_pb2.CommitmentAccepted(run=RUN, cycle=cycle, miner=MINER.public, digest=bytes(32))
        told.publish("commit", cycle, "accepted", accepted, MINER.public)
        told.closed("commit", cycle)
        told.publish(
            "commit", cycle, "settled", cycle_pb2.WindowSettled(run=RUN, cycle=cycle, committed=[MINER.public])
        )
        told.opened("submit", cycle)
    told.opened("commit", 3)
    return told


TOLD = ledger()


@QUICK
@given(SUBJECTS)
def test_subjects(subject: str) -> None:
    for parse in (parse_fact, parse_ingress, stream_of):
        with suppress(Invalid):
            parse(subject)
            assert subject.startswith("connito.")


@QUICK
@given(st.one_of(messages(Envelope), st.binary(max_size=200)), SUBJECTS)
def test_envelopes_that_nobody_signed(made: Message | bytes, subject: str) -> None:
    data = made if isinstance(made, bytes) else made.SerializeToString()
    record = Record("INGRESS", 1, subject, data, 0)
    for read in (
        lambda: open_bytes(data, subject),
        lambda: verify_ingress(record),
        lambda: verify_fact(record, ROSTER),
    ):
        with pytest.raises(Invalid) as caught:
            read()
        assert caught.value.reason


@QUICK
@given(
    st.sampled_from(sorted(INGRESS)).flatmap(lambda kind: st.tuples(st.just(kind), messages(INGRESS[kind]))),
    st.booleans(),
)
def test_what_a_miner_signs_is_answered_or_refused(said: tuple[str, Message], named: bool) -> None:
    kind, message = said
    if named:
        message.run = RUN  # type: ignore[attr-defined]
    subject = ingress(RUN, MINER.public, kind)
    record = Record("INGRESS", 10_000, subject, seal(MINER, subject, message).SerializeToString(), 0)
    answer: object = None
    with suppress(Invalid):
        fact = verify_ingress(record)
        if kind == "commitment":
            answer = judging.judge_commitment(TOLD.facts, fact)
        elif kind == "reveal":
            answer = judging.judge_reveal(TOLD.facts, fact)
    if isinstance(answer, cycle_pb2.Refused):
        assert answer.reason
        assert reason_name(answer.reason)
        assert 0 < len(detail_of(answer)) < 2000


@QUICK
@given(st.sampled_from(sorted(CATALOGUE)).flatmap(lambda key: st.tuples(st.just(key), messages(CATALOGUE[key][0]))))
def test_what_a_service_signs_is_a_fact_or_invalid(said: tuple[tuple[str, str], Message]) -> None:
    (section, kind), message = said
    for id_ in ("", f".{SERVICE.public}"):
        subject = f"connito.v1.{RUN}.{section}.1.{kind}{id_}"
        record = Record("X", 1, subject, seal(SERVICE, subject, message).SerializeToString(), 0)
        with suppress(Invalid):
            verify_fact(record, ROSTER)


@QUICK
@given(messages(services_pb2.UploadCommand), st.booleans(), st.sampled_from(["rpc.RequestUpload", "rpc.Other"]))
def test_upload_requests(command: services_pb2.UploadCommand, named: bool, subject: str) -> None:
    if named:
        command.run = RUN
    envelope = seal(MINER, subject, command)
    with suppress(Invalid, Retry):
        opened, miner = open_request(envelope, "rpc.RequestUpload", services_pb2.UploadCommand)
        facts = TOLD.facts if opened.run == RUN else None
        judging.judge_upload(judging.known_run(facts, opened.run), miner, opened)


@QUICK
@given(messages(artifacts_pb2.ArtifactRef))
def test_references_name_one_object_or_are_refused(ref: artifacts_pb2.ArtifactRef) -> None:
    try:
        key = key_of(ref)
    except ConnitoError:
        return
    assert key.endswith(f"/sha256/{ref.digest}")
    assert key.count("/") == 2


@given(st.integers(-(2**31), 2**31 - 1))
def test_a_reason_from_the_future_has_a_name(number: int) -> None:
    assert number == 0 or reason_name(number)  # type: ignore[arg-type]


GOOD = tensor_bytes(
    {"layers.0.up_proj": np.ones((2, 4, 4), np.float32), "layers.1.up_proj": np.ones((2, 4), np.float32)}
)
LAYOUT = expected_layout(GOOD)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "I64", [0, 64], [0, 128], [64, 0], [2, 4, 4], [10**17] * 8, [True, 4]]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "layers.0.up_proj", "layers.1.up_proj"])
        | st.text(max_size=5),
        inner,
        max_size=5,
    ),
    max_leaves=14,
)  # fmt: skip


@QUICK
@given(JSON, st.binary(max_size=200), st.integers(-9, 9))
def test_headers(document: object, body: bytes, off: int) -> None:
    text = json.dumps(document).encode()
    data = max(0, len(text) + off).to_bytes(8, "little") + text + body
    with suppress(Invalid):
        read_header(data)
    with suppress(Invalid):
        validate(data, LAYOUT, GOOD, 0.5)


@contextmanager
def bounded(seconds: float, megabytes: float) -> Iterator[None]:
    """Neither more time nor more memory, whatever the file says of itself."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        yield
        took, peak = time.process_time() - begun, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < seconds, took
    assert peak < megabytes * 2**20, peak


def header(text: bytes, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + body


ENTRY = b'"%d":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
BOMBS = {
    "longer than memory": (1 << 60).to_bytes(8, "little") + b"{}",
    "brackets": header(b'{"a":' + b"[" * (MAX_HEADER_BYTES // 2 - 10) + b"]" * (MAX_HEADER_BYTES // 2 - 10) + b"}"),
    "braces": header(b'{"a":' * (MAX_HEADER_BYTES // 6) + b"1" + b"}" * (MAX_HEADER_BYTES // 6)),
    "one long number": header(b'{"a":' + b"9" * (MAX_HEADER_BYTES - 20) + b"}"),
    "one long exponent": header(b'{"a":1e' + b"9" * (MAX_HEADER_BYTES - 20) + b"}"),
    "one long name": header(b'{"' + b"a" * (MAX_HEADER_BYTES - 20) + b'":1}'),
    "many tensors in one place": header(b"{" + b",".join(ENTRY % i for i in range(18_000)) + b"}", bytes(4)),
    "many dimensions": header(
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 400_000 + b'1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "a product beyond numbers": header(
        b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 18] * 8) + b'],"data_offsets":[0,4]}}', bytes(4)
    ),
    "escapes": header(b'{"' + b"\\u0041" * (MAX_HEADER_BYTES // 6 - 10) + b'":1}'),
    "spaces": header(b"{" + b" " * (MAX_HEADER_BYTES - 20) + b"}"),
    "metadata": header(b'{"__metadata__":{' + b",".join(b'"%d":"x"' % i for i in range(60_000)) + b"}}"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_header_bombs_cost_little(kind: str) -> None:
    with bounded(seconds=5, megabytes=80), pytest.raises(Invalid) as caught:
        validate(BOMBS[kind], LAYOUT, GOOD, 0.5)
    assert caught.value.reason


def test_a_file_that_claims_terabytes_is_never_allocated() -> None:
    text = json.dumps({"layers.0.up_proj": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}})
    with bounded(seconds=1, megabytes=4), pytest.raises(Invalid):
        validate(header(text.encode(), bytes(64)), LAYOUT)


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, 1 << 24])
def test_an_envelope_beyond_the_limit_is_not_even_parsed(size: int) -> None:
    data = memory_of(size)
    with bounded(seconds=2, megabytes=4), pytest.raises(Invalid):
        open_bytes(data, "connito.v1.r1.ingress.U.reveal")


def memory_of(size: int) -> bytes:
    """A field that says it has all of it."""
    return b"\x12\xff\xff\xff\xff\x07" + bytes(size - 6)

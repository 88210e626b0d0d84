"""Every method of every API, called over a real connection by keys that are admitted and mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, cast

import grpc
import pytest
from connito.bus import Bus
from connito.errors import Retry
from connito.runtime.host import HOST
from connito.runtime.limits import RateLimit
from connito.service import rpc
from connito.store import ArtifactStore, key_of
from connito.v1 import run_pb2, services_pb2, services_pb2_grpc
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, REALM_SUBMISSION, ArtifactRef
from connito.v1.envelope_pb2 import Envelope
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from services.committer import api as committer
from services.committer.state import State as Committed
from services.coordinator import api as coordinator
from services.coordinator.state import State as Coordinated
from services.library import api as library
from services.library.state import Catalogue
from tests.support.run import RUN, Run

MALLORY, VICTIM = Identity.generate(b"mallory".ljust(32)), Identity.generate(b"victim".ljust(32))
ROSTER = Roster({"customer": frozenset({MALLORY.public, VICTIM.public})})
CLOSED = run_pb2.EnrolmentPolicy(mode="allow-list", allowed=[VICTIM.public])
TEXTS = [
    "", "\0", "../../etc/passwd", "/", ".", "*", ">", "a.b", "\u202e\u0000\U0001f4a3", "\x1b[2J", "x" * 100, "x" * 70_000,
    "é" * 5_000, "'; drop table experts; --", '"', "NEAR(a b", "a* OR b", "^col:x", "(" * 500, "%s%n{0}", "nan", "-1", RUN,
    "installation", "library", MALLORY.public, "U" + "A" * 55, "0" * 64, "F" * 64, "YWZ0ZXI6OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5",
    "ZnJvbTo5OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk=", "ZnJvbTotMQ==", "ZnJvbTrZoQ==",
]  # fmt: skip
# What is tried in each field of each policy.
FEW = ["../\0" + "x" * 5_000]
NUMBERS: dict[int, list[Any]] = {
    FieldDescriptor.CPPTYPE_INT64: [-(2**63), -1, 0, 2**63 - 1],
    FieldDescriptor.CPPTYPE_UINT64: [0, 2**64 - 1],
    FieldDescriptor.CPPTYPE_UINT32: [0, 2**32 - 1],
    FieldDescriptor.CPPTYPE_INT32: [-(2**31), 2**31 - 1],
    FieldDescriptor.CPPTYPE_DOUBLE: [float("nan"), float("inf"), -0.0, 1e308],
    FieldDescriptor.CPPTYPE_FLOAT: [float("nan"), float("-inf")],
    FieldDescriptor.CPPTYPE_BOOL: [True],
    FieldDescriptor.CPPTYPE_ENUM: [0, 1, 99, -1],
}
# What each method asks to be signed, and as what.
SIGNED: dict[str, tuple[str, type[Message]]] = {
    "CreateRun": ("rpc.CreateRun", run_pb2.RunSpec),
    "CancelRun": ("rpc.CancelRun", services_pb2.CancelRunCommand),
    "EnrolMiner": ("rpc.EnrolMiner", services_pb2.EnrolMinerCommand),
    "AdmitMiner": ("rpc.AdmitMiner", services_pb2.AdmitMinerCommand),
    "BanMiner": ("rpc.BanMiner", run_pb2.BanOrder),
    "RequestUpload": ("rpc.RequestUpload", services_pb2.UploadCommand),
    "RequestDownloads": ("rpc.RequestDownloads", services_pb2.DownloadsCommand),
    "MarkExpert": ("rpc.MarkExpert", services_pb2.MarkExpertCommand),
    "MeterUse": ("rpc.MeterUse", services_pb2.MeterUseCommand),
}
_RUNS, _EXPERTS = ("GetRun", "ListRuns", "WatchRun"), ("GetExpert", "ListExperts", "SearchExperts", "GetLedger")
VIEWED: dict[str, tuple[str, type[Message]]] = {
    **dict.fromkeys(_RUNS, ("rpc.ReadRuns", services_pb2.ReadRunsCommand)),
    **dict.fromkeys(_EXPERTS, ("rpc.ReadLibrary", services_pb2.ReadLibraryCommand)),
}
SERVICES = {
    service.name: {method.name: method for method in service.methods}
    for service in services_pb2.DESCRIPTOR.services_by_name.values()
}


class NoBus:
    """A broker that takes nothing: whatever is written there was let through by mistake."""

    host = HOST

    def __init__(self) -> None:
        self.written: list[Message] = []

    async def publish_fact(self, run: str, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> int:
        self.written.append(message)
        return 1

    async def last_sequence(self, stream: str) -> int:
        return 0

    async def refresh(self, *_: Any) -> None:
        return None


class NoStore:
    def __init__(self) -> None:
        self.signed: list[ArtifactRef] = []

    async def stat(self, ref: ArtifactRef) -> int | None:
        key_of(ref)
        return None

    def presign_put(self, ref: ArtifactRef, _: int) -> tuple[str, dict[str, str]]:
        self.signed.append(ref)
        return "http://store/", {}

    def presign_get(self, ref: ArtifactRef, _: int) -> str:
        self.signed.append(ref)
        return "http://store/"


class Platform:
    def __init__(self) -> None:
        self.bus, self.store = NoBus(), NoStore()
        run = Run().created(customer=VICTIM.public, visibility="private", enrolment=CLOSED)
        self.coordinated, self.committed = Coordinated(ROSTER), Committed(ROSTER)
        self.coordinated.runs[RUN] = self.committed.runs[RUN] = run.facts
        for state in (self.coordinated, self.committed):
            state.refresh = self.bus.refresh  # type: ignore[method-assign, assignment]
        free = RateLimit(1e9, 1e9, time.monotonic)
        bus, store = cast(Bus, self.bus), cast(ArtifactStore, self.store)
        runs = coordinator.RunApi(bus, self.coordinated, ROSTER, self.coordinated.changes, free)
        runs._readers._limit = free
        self.servicers: list[rpc.Servicer] = [
            (services_pb2_grpc.add_RunServiceServicer_to_server, runs, coordinator.NAME),
            (
                services_pb2_grpc.add_SubmissionServiceServicer_to_server,
                committer.SubmissionApi(bus, self.committed, store, free, 60),
                committer.NAME,
            ),
            (
                services_pb2_grpc.add_LibraryServiceServicer_to_server,
                library.Library(
                    Catalogue(), store, bus, ROSTER, self.bus.refresh, lambda: int(time.time() * 1000), free
                ),
                library.NAME,
            ),
        ]

    async def call(self, channel: grpc.aio.Channel, method: str, request: Message) -> tuple[grpc.StatusCode, str]:
        service = next(name for name, methods in SERVICES.items() if method in methods)
        stub = getattr(services_pb2_grpc, f"{service}Stub")(channel)
        try:
            answer = getattr(stub, method)(request, timeout=10.0)
            if SERVICES[service][method].server_streaming:
                async for _ in answer:
                    break
            else:
                await answer
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, ""


@pytest.fixture
async def platform() -> AsyncIterator[tuple[Platform, grpc.aio.Channel]]:
    platform = Platform()
    async with rpc.serve(platform.servicers, "127.0.0.1", 0) as port, rpc.channel(f"127.0.0.1:{port}") as channel:
        yield platform, channel


def hostile(kind: type[Message], texts: Sequence[str] = TEXTS) -> Iterator[Message]:
    """A message of a kind with each of its fields, and of those inside, set to each hostile value in turn."""
    for field in kind.DESCRIPTOR.fields:
        for value in _values(field, texts):
            message = kind()
            with contextlib.suppress(ValueError, TypeError):
                _set(message, field, value)
                yield message


def _values(field: Any, texts: Sequence[str]) -> Iterator[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        binary = field.type == FieldDescriptor.TYPE_BYTES
        values: list[Any] = [b"", b"\0" * 32, b"\xff" * 70_000] if binary else list(texts)
        yield from values
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        kind = GetMessageClass(field.message_type)
        yield kind()
        if kind is not Envelope:
            yield from hostile(kind, FEW)
    else:
        yield from NUMBERS[field.cpp_type]


def _set(message: Message, field: Any, value: Any) -> None:
    place = getattr(message, field.name)
    if field.is_repeated:
        place.extend([value] * 3)
    elif isinstance(value, Message):
        place.CopyFrom(value)
    else:
        setattr(message, field.name, value)


def requests(method: str) -> Iterator[Message]:
    """What a hostile key sends to a method: well signed, and everything in it wrong in turn."""
    service = next(methods for methods in SERVICES.values() if method in methods)
    kind = GetMessageClass(service[method].input_type)
    subject, inner = (SIGNED | VIEWED)[method]
    where = "envelope" if method in SIGNED else "viewer"
    for message in hostile(inner, FEW if inner is run_pb2.RunSpec else TEXTS):
        request = kind()
        getattr(request, where).CopyFrom(seal(MALLORY, subject, message))
        yield request
    good = seal(MALLORY, subject, inner())
    for broken in _envelopes(good):
        request = kind()
        getattr(request, where).CopyFrom(broken)
        yield request
    for request in hostile(kind):
        if not getattr(request, where).ByteSize():
            getattr(request, where).CopyFrom(good)
        yield request


def _envelopes(good: Envelope) -> Iterator[Envelope]:
    for message in hostile(Envelope):
        broken = Envelope()
        broken.CopyFrom(good)
        broken.MergeFromString(message.SerializeToString())
        yield broken


@pytest.mark.parametrize("method", [pytest.param("CreateRun", marks=pytest.mark.slow), *list(SIGNED)[1:], *VIEWED])
async def test_every_argument_is_answered_in_a_sentence(
    method: str, platform: tuple[Platform, grpc.aio.Channel]
) -> None:
    stage, channel = platform
    asked = list(requests(method))
    assert len(asked) > 40
    for start in range(0, len(asked), 32):
        answers = await asyncio.gather(*(stage.call(channel, method, request) for request in asked[start : start + 32]))
        for request, (code, said) in zip(asked[start:], answers, strict=False):
            assert code in FINE, (code, said[:300], str(request)[:300])
            assert len(said.encode()) < 5000, said[:300]
            assert "Traceback" not in said
            assert "\x1b" not in said
    assert stage.bus.written == []
    # Whatever was asked for, nothing is remembered about it.
    assert set(stage.coordinated.changes._events) <= {RUN}


FINE = {
    grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED,
}  # fmt: skip


async def test_another_tenants_run_is_not_read_ended_or_taken_over(platform: tuple[Platform, grpc.aio.Channel]) -> None:
    stage, channel = platform
    spec, cancel = run_pb2.RunSpec(run=RUN), services_pb2.CancelRunCommand(run=RUN)
    order = run_pb2.BanOrder(run=RUN, miner=VICTIM.public, why="mine")
    viewer = seal(MALLORY, "rpc.ReadRuns", services_pb2.ReadRunsCommand())
    for method, request in {
        "GetRun": services_pb2.GetRunRequest(run=RUN, viewer=viewer),
        "WatchRun": services_pb2.WatchRunRequest(run=RUN, viewer=viewer),
        "CancelRun": services_pb2.CancelRunRequest(envelope=seal(MALLORY, "rpc.CancelRun", cancel)),
        "BanMiner": services_pb2.BanMinerRequest(envelope=seal(MALLORY, "rpc.BanMiner", order)),
        "CreateRun": services_pb2.CreateRunRequest(envelope=seal(MALLORY, "rpc.CreateRun", spec)),
    }.items():
        code, said = await stage.call(channel, method, request)
        assert code in FINE - {grpc.StatusCode.OK}, (method, code, said)
    assert stage.bus.written == []


def dated(method: str, date_ms: int) -> Message:
    """The victim's own request, for its own run: as good as one can be, but for its date."""
    subject, kind = (SIGNED | VIEWED)[method]
    fields = {name: RUN for name in ("run",) if name in kind.DESCRIPTOR.fields_by_name}
    sealed = seal(VICTIM, subject, kind(**fields), now_ms=date_ms)
    service = next(methods for methods in SERVICES.values() if method in methods)
    request = GetMessageClass(service[method].input_type)()
    getattr(request, "envelope" if method in SIGNED else "viewer").CopyFrom(sealed)
    return request


@pytest.mark.parametrize("method", ["RequestDownloads", "RequestUpload", "GetRun", "GetExpert", "BanMiner", "MeterUse"])
@pytest.mark.parametrize("when_ms", [-8_000_000, 8_000_000, -(2**62), 2**62])
async def test_a_request_that_was_overheard_opens_nothing_later(
    method: str, when_ms: int, platform: tuple[Platform, grpc.aio.Channel]
) -> None:
    stage, channel = platform
    date = when_ms if abs(when_ms) > 2**60 else int(time.time() * 1000) + when_ms
    code, said = await stage.call(channel, method, dated(method, date))
    assert code in FINE - {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}, (code, said)
    assert "clock" in said
    assert (stage.bus.written, stage.store.signed) == ([], [])


@pytest.mark.parametrize("method", ["RequestDownloads", "RequestUpload"])
@pytest.mark.parametrize("off_ms", [-3_600_000, 3_600_000])
async def test_a_miner_whose_clock_is_off_is_answered_like_any_other(
    method: str, off_ms: int, platform: tuple[Platform, grpc.aio.Channel]
) -> None:
    stage, channel = platform
    now = int(time.time() * 1000)
    exact, off = [await stage.call(channel, method, dated(method, now + away)) for away in (0, off_ms)]
    assert exact == off
    assert "clock" not in off[1]


@pytest.mark.parametrize(
    "artifact",
    [
        ArtifactRef(digest="../" * 21 + "a", size=1, realm=REALM_PUBLIC),
        ArtifactRef(digest="A" * 64, size=1, realm=REALM_PUBLIC),
        ArtifactRef(digest="0" * 64, size=0, realm=REALM_PUBLIC), ArtifactRef(digest="0" * 64, size=-1, realm=REALM_HOLDOUT),
        ArtifactRef(digest="0" * 64, size=1, realm=REALM_SUBMISSION), ArtifactRef(digest="0" * 64, size=1),
        ArtifactRef(digest="0" * 63 + "\u0660", size=1, realm=REALM_PUBLIC), ArtifactRef(size=1, realm=REALM_PUBLIC),
        ArtifactRef(digest="0" * 64, size=2**63 - 1, realm=REALM_PUBLIC),
        ArtifactRef(digest="0" * 64, size=(1 << 40) + 1, realm=REALM_HOLDOUT),
    ],
)  # fmt: skip
async def test_no_address_is_signed_for_what_is_no_object(
    artifact: ArtifactRef, platform: tuple[Platform, grpc.aio.Channel]
) -> None:
    stage, channel = platform
    command = services_pb2.UploadCommand(artifact=artifact)
    request = services_pb2.RequestUploadRequest(envelope=seal(MALLORY, "rpc.RequestUpload", command))
    code, said = await stage.call(channel, "RequestUpload", request)
    assert code in FINE - {grpc.StatusCode.OK}, said
    assert stage.store.signed == []


@pytest.mark.parametrize("after", ["nan", "inf", "-1", "", "1e309", "soon", "9" * 5000])
def test_what_a_server_says_of_waiting_is_bounded(after: str) -> None:
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata((rpc.AFTER_KEY, after)), "later", ""
    )
    found = rpc.error_of(error)
    assert isinstance(found, Retry)
    assert 0.0 <= found.after <= 3600.0

"""gRPC over a real socket: the error that is raised is the error that arrives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from connito.errors import ConnitoError, Fatal, Invalid, NotFound, Retry, VerificationFailed
from connito.service import rpc
from connito.v1 import reasons_pb2, run_pb2, services_pb2, services_pb2_grpc
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from grpc_health.v1 import health_pb2, health_pb2_grpc

pytestmark = pytest.mark.integration

RUN_SERVICE = "connito.v1.RunService"


class Runs(services_pb2_grpc.RunServiceServicer):
    """Raises what the test put there."""

    error: Exception | None = None

    def __init__(self, roster: Any) -> None:
        self.roster = roster

    async def CreateRun(self, request: Any, context: Any) -> Any:  # noqa: N802 - the generated name
        if self.error is not None:
            raise self.error
        spec, _ = rpc.open_request(request.envelope, "rpc.CreateRun", run_pb2.RunSpec, self.roster, "customer")
        return services_pb2.CreateRunResponse(run=spec.run)

    async def GetRun(self, request: Any, context: Any) -> services_pb2.GetRunResponse:  # noqa: N802
        await asyncio.Event().wait()
        raise AssertionError

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield services_pb2.WatchRunResponse(status=services_pb2.RunStatus(cycle=1))
        raise NotFound("the run ended")


@pytest.fixture
async def served(roster: Roster) -> AsyncIterator[tuple[Runs, services_pb2_grpc.RunServiceStub, grpc.aio.Channel]]:
    runs = Runs(roster)  # type: ignore[abstract] # what it leaves out is answered by gRPC
    registration = (services_pb2_grpc.add_RunServiceServicer_to_server, runs, RUN_SERVICE)
    async with (
        rpc.serve([registration], "127.0.0.1", 0, drain_s=0.1) as port,
        rpc.channel(f"127.0.0.1:{port}") as channel,
    ):
        yield runs, services_pb2_grpc.RunServiceStub(channel), channel


@pytest.mark.parametrize(
    "error",
    [
        Invalid("no good", reason=reasons_pb2.REASON_BAD_SPEC),
        Invalid("not yours", reason=reasons_pb2.REASON_NOT_PERMITTED),
        Invalid("unknown miner", reason=reasons_pb2.REASON_NOT_ENROLLED),
        NotFound("no such run", reason=reasons_pb2.REASON_UNKNOWN_RUN),
        VerificationFailed("other bytes", reason=reasons_pb2.REASON_DIGEST_MISMATCH),
        Retry("come back", after=2.5),
        Fatal("broken: ünïcode"),
    ],
)
async def test_errors_cross_the_wire(served: Any, error: ConnitoError) -> None:
    runs, stub, _ = served
    runs.error = error
    with pytest.raises(type(error)) as caught:
        await rpc.call(stub.CreateRun, services_pb2.CreateRunRequest())
    assert type(caught.value) is type(error)
    assert str(error) in str(caught.value)
    assert getattr(caught.value, "reason", None) == getattr(error, "reason", None)
    assert getattr(caught.value, "after", None) == getattr(error, "after", None)


async def test_a_bug_in_a_method_is_fatal_for_the_caller_only(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    runs, stub, _ = served
    runs.error = ZeroDivisionError("secret detail")
    with pytest.raises(Fatal, match="ZeroDivisionError") as caught:
        await rpc.call(stub.CreateRun, services_pb2.CreateRunRequest())
    assert "secret detail" not in str(caught.value)
    runs.error = Retry("still alive")
    with pytest.raises(Retry):
        await rpc.call(stub.CreateRun, services_pb2.CreateRunRequest())


async def test_a_signed_request_is_opened(served: Any, identities: dict[str, Identity]) -> None:
    _, stub, _ = served
    envelope = seal(identities["customer"], "rpc.CreateRun", run_pb2.RunSpec(run="r1"))
    answer = await rpc.call(stub.CreateRun, services_pb2.CreateRunRequest(envelope=envelope))
    assert answer.run == "r1"


@pytest.mark.parametrize(
    ("signer", "subject", "reason"),
    [
        ("miner", "rpc.CreateRun", reasons_pb2.REASON_NOT_PERMITTED),
        ("customer", "rpc.CancelRun", reasons_pb2.REASON_BAD_SIGNATURE),
    ],
)
async def test_a_request_by_another_or_for_another_method_is_refused(
    served: Any, identities: dict[str, Identity], signer: Any, subject: Any, reason: Any
) -> None:
    _, stub, _ = served
    envelope = seal(identities[signer], subject, run_pb2.RunSpec(run="r1"))
    with pytest.raises(Invalid) as caught:
        await rpc.call(stub.CreateRun, services_pb2.CreateRunRequest(envelope=envelope))
    assert caught.value.reason == reason


async def test_a_method_that_is_not_implemented(served: Any) -> None:
    _, stub, _ = served
    with pytest.raises(Fatal):
        await rpc.call(stub.ListRuns, services_pb2.ListRunsRequest())


async def test_a_stream_ends_with_its_error(served: Any) -> None:
    _, stub, _ = served
    stream = stub.WatchRun(services_pb2.WatchRunRequest(run="r"))
    assert (await stream.read()).status.cycle == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert isinstance(rpc.error_of(caught.value), NotFound)


async def test_deadline_is_retry(served: Any) -> None:
    _, stub, _ = served
    began = time.monotonic()
    with pytest.raises(Retry):
        await rpc.call(stub.GetRun, services_pb2.GetRunRequest(), deadline_s=0.2)
    assert time.monotonic() - began < 20


async def test_nobody_listens_is_retry() -> None:
    async with rpc.channel("127.0.0.1:1") as channel:
        with pytest.raises(Retry):
            await rpc.call(services_pb2_grpc.RunServiceStub(channel).GetRun, services_pb2.GetRunRequest(), deadline_s=1)


async def test_health_is_told_and_nothing_about_the_api(served: Any) -> None:
    _, _, channel = served
    check = health_pb2_grpc.HealthStub(channel).Check
    for name in ("", RUN_SERVICE):
        answer = await check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    listing = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(listing(iter([b""]))))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_taken_port_is_named(served: Any) -> None:
    async with rpc.serve([], "127.0.0.1", 0) as port:
        with pytest.raises(Fatal, match=str(port)):
            async with rpc.serve([], "127.0.0.1", port):
                pass

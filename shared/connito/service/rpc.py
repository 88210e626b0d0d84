"""gRPC with the error taxonomy on both sides, health, and signed requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from connito.bus.offences import kind_of, report
from connito.errors import ConnitoError, Environment, Fatal, Invalid, NotFound, Retry, VerificationFailed
from connito.runtime.logs import extract, get_logger, inject, use
from connito.v1 import reasons_pb2 as reasons
from connito.v1.envelope_pb2 import Envelope
from connito.wire.bounds import check_bounds, cut
from connito.wire.enums import name_of, reason_name
from connito.wire.envelope import MAX_ENVELOPE_BYTES, check
from connito.wire.roster import Roster
from connito.wire.tls import PLAIN, Tls

if TYPE_CHECKING:
    from connito.bus import Bus
    from connito.service.runner import ServiceContext

log = get_logger("rpc")

M = TypeVar("M", bound=Message)
R = TypeVar("R")

REASON_KEY = "connito-reason"
_REASONS = frozenset(reasons.Reason.keys())
AFTER_KEY = "connito-retry-after"
# How old, or how far ahead, a request may be.
FRESH_MS = 300_000
# Longer nobody is sent away.
_LONGEST_AFTER = 3600.0
REGISTERED_EVERY = 3.0
_SILENT = 2
# A run's status names all who take part.
ANSWER_BYTES = 1 << 26
_OPTIONS = [
    ("grpc.max_receive_message_length", 2 * MAX_ENVELOPE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 64),
]
# What a status says travels in a header, which HTTP/2 libraries bound at 8 KiB.
_WORDS_BYTES = 2000
# Of all connections together; what is more is turned away at once.
_CALLS_AT_ONCE = 2000

# (register function of the generated code, implementation, full name of the service)
Servicer = tuple[Callable[[Any, Any], None], object, str]


def status_of(error: ConnitoError) -> grpc.StatusCode:
    """Return the status that says what `error` says."""
    if isinstance(error, Environment):
        return grpc.StatusCode.UNAVAILABLE
    if isinstance(error, NotFound):
        return grpc.StatusCode.NOT_FOUND
    if isinstance(error, VerificationFailed):
        return grpc.StatusCode.FAILED_PRECONDITION
    if isinstance(error, Invalid):
        denied = error.reason in (
            reasons.REASON_NOT_PERMITTED, reasons.REASON_BAD_SIGNATURE, reasons.REASON_NOT_ENROLLED,
            reasons.REASON_BANNED, reasons.REASON_NOT_INVITED, reasons.REASON_INVITE_INVALID,
        )  # fmt: skip
        return grpc.StatusCode.PERMISSION_DENIED if denied else grpc.StatusCode.INVALID_ARGUMENT
    return grpc.StatusCode.INTERNAL


def error_of(error: grpc.aio.AioRpcError) -> ConnitoError:
    """Return the project's error for a failed call: the inverse of `status_of`."""
    code, text = error.code(), error.details() or error.code().name.lower()
    pairs: Any = error.trailing_metadata() or ()
    trailer = {str(name): str(value) for name, value in pairs}
    name = trailer.get(REASON_KEY, "")
    reason = reasons.Reason.Value(name) if name in _REASONS else reasons.REASON_MALFORMED
    # A side that ends a call at its deadline, or because it is ending itself, may say so before this side's own clock does.
    if code in (
        grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
    ):  # fmt: skip
        return Retry(text, after=_after(trailer, 1.0))
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFound(text, reason=reason)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return VerificationFailed(text, reason=reason)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return Invalid(text, reason=reason if name else reasons.REASON_NOT_PERMITTED)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return Invalid(text, reason=reason, after=_after(trailer, 0.0))
    return Fatal(f"the call failed on the other side: {text}")


def _after(trailer: dict[str, str], default: float) -> float:
    """Return how long to wait, whatever the other side says: it may be no number, or no end."""
    try:
        said = float(trailer.get(AFTER_KEY, default))
    except ValueError:
        return default
    return min(said, _LONGEST_AFTER) if said >= 0.0 else default


class _Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc,type-arg,unused-ignore]
    """Turns what a method raises into a status, and continues the caller's trace."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _unary(handler.unary_unary), handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream is not None and not details.method.startswith("/grpc."):
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return handler


def _continue_trace(context: Any) -> None:
    use(extract({str(name): str(value) for name, value in context.invocation_metadata() or ()}))


def _unary(method: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        _continue_trace(context)
        try:
            check_bounds(request)
            answer = method(request, context)
            return await answer if asyncio.iscoroutine(answer) else answer
        except ConnitoError as error:
            await _abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _fault(context, error)

    return call


def _stream(method: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        _continue_trace(context)
        try:
            check_bounds(request)
            async for item in method(request, context):
                yield item
        except ConnitoError as error:
            await _abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _fault(context, error)

    return call


async def _fault(context: Any, error: Exception) -> None:
    """Answer a request that makes its handler fail; nobody else's notices."""
    log.error("a request makes its handler fail", exc_info=error)
    await _abort(context, Fatal(f"the service failed on this request ({type(error).__name__}); tell its operator"))


async def _abort(context: Any, error: ConnitoError) -> None:
    trailer: list[tuple[str, str]] = []
    if isinstance(error, Environment):
        trailer.append((AFTER_KEY, str(error.after)))
        log.warning("a call comes again later", waits_for=error.dependency, error=str(error))
    elif isinstance(error, Invalid):
        trailer.append((REASON_KEY, name_of(reasons.Reason, error.reason)))
        if error.after:
            trailer.append((AFTER_KEY, str(error.after)))
        if error.reason in (reasons.REASON_BAD_SIGNATURE, reasons.REASON_NOT_PERMITTED, reasons.REASON_BANNED):
            report(kind_of(error.reason), subject="rpc", reason=error.reason, detail=str(error))
        log.info("refused a call", reason=reason_name(error.reason), error=str(error))
    else:
        log.error("a call failed", error=str(error))
    await context.abort(status_of(error), _plain(str(error)), tuple(trailer))


def _plain(text: str) -> str:
    """Return what a status can carry: words of a request that is refused may be any length, and steer a terminal."""
    return cut("".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text), _WORDS_BYTES)


@asynccontextmanager
async def serve(
    servicers: Sequence[Servicer], host: str, port: int, *, drain_s: float = 2.0, tls: Tls = PLAIN
) -> AsyncIterator[int]:
    """Serve until the block is left, with health; yields the port (a free one for 0).

    Raises `Fatal` when the address is taken. Calls in flight get `drain_s` to finish.
    """
    server = grpc.aio.server(interceptors=[_Interceptor()], options=_OPTIONS, maximum_concurrent_rpcs=_CALLS_AT_ONCE)
    checks: Any = health.aio.HealthServicer()  # type: ignore[attr-defined,unused-ignore]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for register, implementation, name in servicers:
        register(implementation, server)
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    try:
        where = f"{host}:{port}"
        plain = tls.api == "off"
        bound = server.add_insecure_port(where) if plain else server.add_secure_port(where, tls.server_credentials())
    except RuntimeError as error:
        raise Fatal(f"cannot listen on {host}:{port}: {error}; set CONNITO_GRPC_PORT to a free port") from error
    await server.start()
    try:
        yield bound
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(drain_s)


# Tells what `serves_at` does.
Serves = Callable[[str, Tls], Awaitable[bool]]
# Serves an API as `serve_api` does.
ServeApi = Callable[["ServiceContext[Any]", Servicer], AbstractAsyncContextManager[str]]


def authorization(context: Any) -> str:
    """Return what a caller sends as `authorization` beside the request; empty where nothing is."""
    sent = dict(context.invocation_metadata() or ()) if context is not None else {}
    return str(sent.get("authorization", ""))


@asynccontextmanager
async def serve_api(context: ServiceContext[Any], servicer: Servicer) -> AsyncIterator[str]:
    """Serve a service's API where its settings say; yields the address that others reach it at. Raises `Fatal`."""
    settings = context.settings
    async with serve([servicer], settings.grpc_host, settings.grpc_port, tls=settings.tls) as port:
        context.announce_port("grpc", port)
        yield settings.grpc_advertise or f"{settings.grpc_host}:{port}"


async def register(bus: Bus, name: str, address: str, wanted: Callable[[], bool] = lambda: True) -> None:
    """Tell others where the API of `name` is, however long the broker is away, as long as that is `wanted`."""
    while wanted():
        try:
            await bus.register_endpoint(name, address)
        except Retry as error:
            log.warning("cannot register the API's address, trying again", error=str(error))
            await asyncio.sleep(error.after)
        else:
            return


async def stay_registered(
    bus: Bus,
    name: str,
    address: str,
    tls: Tls = PLAIN,
    every: float = REGISTERED_EVERY,
    serves: Serves | None = None,
) -> None:
    """Take over the entry of `name` whenever nobody serves at the address that stands there. For ever.

    Of several replicas without a common address the last one to register is found; when that one is lost, another must be.
    `serves` asks an address, `serves_at` unless given.
    """
    ask = serves or serves_at
    silent = 0
    while True:
        await asyncio.sleep(every)
        try:
            known = await bus.find_endpoint(name, timeout=0.0)
        except Retry:
            known = ""
        silent = 0 if known == address or (known and await ask(known, tls)) else silent + 1
        if silent >= _SILENT:
            log.warning(
                "nobody serves at the registered address, taking over", service=name, before=known, address=address
            )
            await register(bus, name, address)
            silent = 0


async def serves_at(address: str, tls: Tls) -> bool:
    """Tell whether anybody serves at an address."""
    async with channel(address, tls) as one:
        try:
            health_stub = health_pb2_grpc.HealthStub(one)
            await health_stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            return (
                error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
                and error.code() is not grpc.StatusCode.UNAVAILABLE
            )
    return True


def channel(address: str, tls: Tls = PLAIN) -> grpc.aio.Channel:
    """Return a client channel to `host:port`; reconnects by itself within a second."""
    options = [
        ("grpc.max_receive_message_length", ANSWER_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_http_proxy", 0),
    ]
    if tls.api == "off":
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=options)


async def explained(error: Retry, address: str, tls: Tls) -> ConnitoError:
    """Return the reason why an API is unavailable, where that is a certificate; else the error as it is."""
    return await asyncio.to_thread(tls.diagnose, address) or error


async def call(method: Callable[..., Any], request: Message, deadline_s: float = 10.0) -> Any:
    """Call a unary method; its failure comes out as the error that the server raised.

    A server that is not there is `Retry` after `deadline_s` at the latest.
    """
    metadata = tuple(inject({}).items())
    try:
        return await method(request, timeout=deadline_s, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from error


def open_request(
    envelope: Envelope, subject: str, message_type: type[M], roster: Roster | None = None, role: str = ""
) -> tuple[M, str]:
    """Return message and signer of a signed request, for example with subject `rpc.CreateRun`.

    With a role, the signer must have it in the roster. Raises `Invalid` with the reason that applies.
    """
    if not envelope.ByteSize():
        raise Invalid(
            f"a request {subject} is signed by the key of whoever asks; this one is not: use a client that signs it",
            reason=reasons.REASON_BAD_SIGNATURE,
        )
    opened = check(envelope, subject)
    if role:
        (roster or Roster({})).require(role, opened.signer)
    message = opened.read(message_type)
    check_bounds(message)
    return message, opened.signer


def check_fresh(
    envelope: Envelope,
    now_ms: int,
    reason: reasons.Reason.ValueType = reasons.REASON_MALFORMED,
    within_ms: int = FRESH_MS,
) -> None:
    """Raise `Invalid` for a request that was not signed within `within_ms` of now, so that a copied one opens nothing later."""
    if abs(apart := now_ms - envelope.issued_at_unix_ms) > within_ms:
        away = f"{abs(apart) / 60_000:.0f} minutes {'behind' if apart > 0 else 'ahead of'}"
        raise Invalid(
            f"the request is dated {away} the platform's clock, and {within_ms // 60_000} are let through: set the "
            "clock that is wrong, the signer's or the broker's (`timedatectl set-ntp true`), or sign again what was signed then",
            reason=reason,
        )

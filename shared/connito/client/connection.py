"""Calls to a platform's gRPC services, with the project's errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

from google.protobuf.message import Message

from connito.errors import Invalid, Retry
from connito.v1 import services_pb2
from connito.v1.envelope_pb2 import Envelope
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.tls import Tls

DEADLINE_SECONDS = 10.0
_STUBS = {
    "coordinator": "RunServiceStub",
    "committer": "SubmissionServiceStub",
    "library": "LibraryServiceStub",
}


class Connection:
    """Channels to services by name, opened when they are first called."""

    def __init__(self, find: Callable[[str], str], identity: Identity | None, tls: Tls, token: str = "") -> None:
        """Use `find` for the `host:port` of a service and `identity` to sign requests; who has none may read with an identity
        provider's `token`."""
        self._find, self._identity, self._tls = find, identity, tls
        self._beside = [("authorization", f"Bearer {token}")] if token else None
        self._open: dict[str, tuple[str, Any, Any]] = {}
        self._files: tuple[bytes | None, ...] = ()
        self._left: list[Any] = []
        self._opening = threading.Lock()

    def call(self, service: str, method: str, request: Message) -> Any:
        """Return the answer. Raises `Retry` when the service is away, else what it refused the call with."""
        import grpc

        from connito.service.rpc import error_of

        address, _, stub = self._reach(service)
        try:
            return getattr(stub, method)(request, timeout=DEADLINE_SECONDS, wait_for_ready=True, metadata=self._beside)
        except grpc.RpcError as error:
            found = error_of(cast(Any, error))
            if isinstance(found, Retry):
                found = self._tls.diagnose(address) or _silent(service, address, cast(Any, error)) or found
            raise found from error

    def stream(self, service: str, method: str, request: Message) -> Iterator[Any]:
        """Yield every answer of a call that goes on. Raises as `call`."""
        import grpc

        from connito.service.rpc import error_of

        try:
            yield from getattr(self._reach(service)[2], method)(request, metadata=self._beside)
        except grpc.RpcError as error:
            raise error_of(cast(Any, error)) from error

    def seal(self, subject: str, message: Message) -> Envelope:
        """Sign a command. Raises `Invalid` without an identity."""
        if self._identity is None:
            raise Invalid("this needs a customer's key: pass `identity=Identity.load(path)`")
        return seal(self._identity, subject, message)

    def viewer(self) -> Envelope | None:
        """Sign who reads; None without an identity, which reads what is public."""
        if self._identity is None:
            return None
        return seal(self._identity, "rpc.ReadLibrary", services_pb2.ReadLibraryCommand(purpose="read"))

    def reader(self) -> dict[str, Any]:
        """Return the fields with which a request says who reads runs. Raises `Invalid` without an identity and a token."""
        if self._identity is None and self._beside:
            return {}
        sealed = self.seal("rpc.ReadRuns", services_pb2.ReadRunsCommand())
        assert self._identity is not None
        return {"viewer": sealed, "admission": next(iter(self._identity.passes), "")}

    def reach(self, service: str) -> None:
        """Find a service. Raises `Invalid` when nobody said where it is, `Retry` when it is away."""
        self._reach(service)

    def close(self) -> None:
        """Close the channels."""
        for channel in [*self._left, *(channel for _, channel, _ in self._open.values())]:
            channel.close()
        self._open.clear()
        self._left.clear()

    def _reach(self, service: str) -> tuple[str, Any, Any]:
        from connito.v1 import services_pb2_grpc

        files = () if self._tls.api == "off" else self._tls.files()
        with self._opening:
            if self._files != files:
                # Certificates were renewed: what is under way goes on, what is asked from now on uses them.
                self._left += [channel for _, channel, _ in self._open.values()]
                self._open.clear()
                self._files = files
            if service not in self._open:
                address = self._find(service)
                channel = _channel(address, self._tls)
                self._open[service] = address, channel, getattr(services_pb2_grpc, _STUBS[service])(channel)
            return self._open[service]


def _silent(service: str, address: str, error: Any) -> Retry | None:
    """Name a service that did not answer in time; None for one that answered that it cannot now."""
    import grpc

    if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
        return None
    return Retry(
        f"the {service} at {address} did not answer within {DEADLINE_SECONDS:.0f} s; see whether it runs (`connito status`, "
        "`connito doctor`) and try again"
    )


def _channel(address: str, tls: Tls) -> Any:
    import grpc

    options = [("grpc.enable_http_proxy", 0)]
    if tls.api == "off":
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, tls.channel_credentials(), options=options)

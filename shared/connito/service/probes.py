"""Serve /healthz, /readyz, /metrics and /waiting from threads, so that no client of them can hold up the service.

What cannot be done now, and why, is at /waiting as JSON.
Health is asked of the event loop: a loop that hangs is not healthy, though the threads go on. It never depends on the
broker, or a broker outage would become a restart storm.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.exposition import ThreadingWSGIServer

from connito.errors import Fatal
from connito.runtime.logs import get_logger
from connito.runtime.waiting import WAITING

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

log = get_logger("probes")

# A connection is cut after this, whatever its client does. So is the wait for an event loop that hangs.
CONNECTION_SECONDS = 5.0
MAX_CONNECTIONS = 128


class Probes:
    """`not_ready` says what is missing; empty once the service does its work. It runs on the loop that makes this."""

    def __init__(self, host: str, port: int, not_ready: Callable[[], str]) -> None:
        """Listen on `host:port`, on a free port for 0. Raises `Fatal` when the address is taken."""
        self._not_ready, self._loop = not_ready, asyncio.get_running_loop()
        try:
            self._server = _Server(host, port)
        except OSError as error:
            # Another port helps where that one is taken or reserved; else the address is not this machine's.
            taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
            remedy = "CONNITO_HTTP_PORT to a free port" if taken else "CONNITO_HTTP_HOST to an address of this machine"
            raise Fatal(f"cannot listen on {host}:{port}: {error.strerror}; set {remedy}") from error
        self.port: int = self._server.server_port
        self._server.set_app(self._answer)
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="probes", daemon=True).start()

    async def close(self) -> None:
        """Stop listening."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status, kind, body = self._page(environ["PATH_INFO"])
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]

    def _page(self, path: str) -> tuple[str, str, bytes]:
        if path == "/metrics":
            return "200 OK", CONTENT_TYPE_LATEST, generate_latest()
        if path == "/waiting":
            rows = [(one.what, one.run, one.dependency, one.error, one.given_up) for one in WAITING.entries()]
            names = ("what", "run", "dependency", "error", "given_up")
            body = json.dumps([dict(zip(names, row, strict=True)) for row in rows])
            return "200 OK", "application/json", body.encode()
        if path not in ("/healthz", "/readyz"):
            return "404 Not Found", "text/plain", b"/metrics, /waiting, /healthz and /readyz are here\n"
        missing = self._ask_loop()
        if missing is None:
            return "503 Service Unavailable", "text/plain", b"the event loop hangs\n"
        if path == "/healthz":
            return "200 OK", "text/plain", b"alive\n"
        if missing:
            return "503 Service Unavailable", "text/plain", f"not ready: {missing}\n".encode()
        return "200 OK", "text/plain", b"ready\n"

    def _ask_loop(self) -> str | None:
        """Return what the service is not ready for; None when its loop does not answer."""
        answer: concurrent.futures.Future[str] = concurrent.futures.Future()
        try:
            self._loop.call_soon_threadsafe(lambda: answer.set_result(self._not_ready()))
            return answer.result(CONNECTION_SECONDS)
        except (TimeoutError, concurrent.futures.TimeoutError, RuntimeError):
            return None


class _Handler(WSGIRequestHandler):
    def setup(self) -> None:
        super().setup()
        # The socket's own time limit starts anew with every byte.
        self._deadline = threading.Timer(CONNECTION_SECONDS + 1, self._cut)
        self._deadline.daemon = True
        self._deadline.start()

    def finish(self) -> None:
        self._deadline.cancel()
        super().finish()

    def _cut(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the base class
        """Log nothing: probes come every few seconds."""


class _Server(ThreadingWSGIServer):
    request_queue_size = 100

    def __init__(self, host: str, port: int) -> None:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((str(address[0]), int(address[1])), _Handler)

    def server_bind(self) -> None:
        """Bind without asking the resolver for this machine's name, as the base class does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; hang up on whoever comes when too many are served already."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the errors of clients that disconnected."""
        log.debug("a probe broke off", client=str(client_address), exc_info=True)

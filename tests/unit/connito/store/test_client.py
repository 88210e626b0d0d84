"""A request that a store holds is asked a second time, if that does no harm."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import urllib3
from connito.store import client
from connito.store.client import SMALL_BYTES, Client, StoreClock
from minio.credentials import StaticProvider


class Holding(BaseHTTPRequestHandler):
    """Holds the first request until the test is over, or breaks it off, and answers the others."""

    seen: list[tuple[str, int]]
    over: threading.Event

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        self.seen.append((self.command, length))
        if len(self.seen) == 1:
            self.over.wait(20)
            return
        self.send_response(200)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_PUT = do_HEAD = do_GET = _answer  # noqa: N815 - as the base class names them

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(params=[1000.0])
def seen(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Client, list[tuple[str, int]]]]:
    monkeypatch.setattr(client, "SOON_SECONDS", 0.2)
    monkeypatch.setattr(client, "READ_SECONDS", request.param)
    requests, over = list[tuple[str, int]](), threading.Event()
    kind = type("Kind", (Holding,), {"seen": requests, "over": over})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    made = Client(
        f"127.0.0.1:{server.server_port}",
        StoreClock(),
        credentials=StaticProvider("key", "secret"),
        secure=False,
        region="us-east-1",
    )
    yield made, requests
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_small_object_is_put_again(seen: tuple[Client, list[tuple[str, int]]]) -> None:
    made, requests = seen
    made.put_object("bucket", "name", io.BytesIO(b"x" * 100), 100)
    made.stat_object("bucket", "name")
    assert requests == [("PUT", 100), ("PUT", 100), ("HEAD", 0)]


def test_an_object_is_looked_for_again(seen: tuple[Client, list[tuple[str, int]]]) -> None:
    made, requests = seen
    made.stat_object("bucket", "name")
    assert requests == [("HEAD", 0)] * 2


@pytest.mark.parametrize("seen", [1.0], indirect=True)
def test_a_large_object_and_one_that_is_read_are_waited_for(seen: tuple[Client, list[tuple[str, int]]]) -> None:
    made, requests = seen
    size = SMALL_BYTES + 1
    with pytest.raises(urllib3.exceptions.MaxRetryError, match="Read timed out"):
        made.put_object("bucket", "name", io.BytesIO(bytes(size)), size)
    requests.clear()
    with pytest.raises(urllib3.exceptions.MaxRetryError, match="Read timed out"):
        made.get_object("bucket", "name")
    assert requests == [("GET", 0)]

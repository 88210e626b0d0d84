"""A base's byte ranges over several connections."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from connito.data.manifest import FileEntry

from services.trainer.base import Ranges

DATA = bytes(range(256)) * 4
TOGETHER = 4
FILE = FileEntry("model.safetensors", "0" * 64, len(DATA), "application/octet-stream")


class Store:
    """A store that answers nobody until so many ask at once; asked one after the other it says 500."""

    def __init__(self) -> None:
        together, self.asked = threading.Barrier(TOGETHER, timeout=20), 0
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                store.asked += 1
                found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
                assert found is not None
                data = DATA[int(found[1]) : int(found[2]) + 1]
                try:
                    together.wait()
                    self.send_response(206)
                except threading.BrokenBarrierError:
                    data = b""
                    self.send_response(500)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


def test_ranges_are_fetched_at_once_and_each_only_once(store: Store, tmp_path: Path) -> None:
    ranges = Ranges({FILE.name: f"http://127.0.0.1:{store.server.server_port}/key?signed=yes"}, tmp_path)
    wanted = [(FILE, 8 * number, 8) for number in range(2 * TOGETHER)]
    ranges.ahead(wanted)
    assert [ranges.read(*each) for each in wanted] == [DATA[start : start + 8] for _, start, _ in wanted]
    assert store.asked == len(wanted)
    ranges.close()
    again = Ranges({}, tmp_path)
    assert again.read(*wanted[1]) == DATA[8:16]

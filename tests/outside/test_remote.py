"""Addresses: https, s3 and hf, read from loopback servers with the reader's own credentials."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from connito.errors import ConnitoError, Invalid, NotFound, Retry
from connito.platform.servers import ObjectStore
from minio import Minio

from tests.support.reading import account, rows, tree

TABLE = [{"text": f"row {i}"} for i in range(500)]
LINES = "".join(json.dumps(row) + "\n" for row in TABLE)


def parquet() -> bytes:
    """A Parquet file of the table."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(TABLE), buffer)
    return buffer.getvalue()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with answers for access that is refused, missing or broken."""

    ANSWERS = ((401, "private"), (403, "forbidden"), (500, "broken"))

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def send_head(self) -> io.BytesIO | None:
        """Refuse by name, else serve."""
        for code, name in self.ANSWERS:
            if name in self.path:
                self.send_error(code)
                return None
        return super().send_head()  # type: ignore[return-value]


@contextmanager
def serving(folder: Path, handler: type[Handler] = Handler) -> Iterator[str]:
    """Serve a folder at the address given."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    files: dict[str, bytes | str] = {
        "a.jsonl": LINES,
        "a.jsonl.gz": gzip.compress(LINES.encode()),
        "a.parquet": parquet(),
        "login.jsonl": "<!DOCTYPE html><html>",
    }
    with serving(tree(tmp_path / "web", files)) as url:
        yield url


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.jsonl?download=true"])
def test_files_behind_a_web_address(web: str, name: str) -> None:
    assert rows(f"{web}/{name}") == TABLE
    # As it looks after it was taken for a path.
    assert rows(Path(f"{web}/{name}")) == TABLE


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("none.jsonl", NotFound, "nothing at"),
        ("private.jsonl", Invalid, "may not be read"),
        ("forbidden.jsonl", Invalid, "may not be read"),
        ("broken.jsonl", Retry, "cannot be reached"),
        ("login.jsonl", Invalid, "a web page in place of data"),
    ],
)
def test_web_addresses_that_give_nothing(web: str, name: str, kind: type[ConnitoError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        rows(f"{web}/{name}")
    assert name in str(caught.value)


def test_addresses_that_nobody_answers() -> None:
    with pytest.raises(Retry, match="cannot be reached"):
        rows("http://127.0.0.1:9/a.jsonl")
    with pytest.raises(Invalid, match="nonsense://a/b"):
        rows("nonsense://a/b")


def test_a_download_that_breaks_off(tmp_path: Path) -> None:
    class Short(Handler):
        def send_head(self) -> io.BytesIO | None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(LINES)))
            self.end_headers()
            return io.BytesIO(LINES[: len(LINES) // 2].encode()) if self.command == "GET" else None

    with serving(tree(tmp_path / "web", {}), Short) as url, pytest.raises((Retry, Invalid)):
        rows(f"{url}/a.jsonl")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """A server of objects with a bucket: its address and two words of access."""
    with ObjectStore(tmp_path_factory.mktemp("weed")) as server:
        client = Minio(server.url.removeprefix("http://"), server.access_key, server.secret_key, secure=False)
        client.make_bucket("data")
        for name, raw in {
            "set/train-0.parquet": parquet(), "set/test-0.parquet": parquet(), "set/README.md": b"# about",
            "set/.hidden.jsonl": b"{}",
            "one.jsonl": LINES.encode(), "more/a.jsonl": LINES.encode(), "more/b.jsonl": LINES.encode(),
        }.items():  # fmt: skip
            client.put_object("data", name, io.BytesIO(raw), len(raw))
        yield server.url, server.access_key, server.secret_key


@pytest.fixture
def credentials(bucket: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials where people have them: in the environment."""
    url, key, secret = bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@pytest.mark.integration
@pytest.mark.usefixtures("credentials")
def test_objects_folders_and_globs_of_s3() -> None:
    assert rows("s3://data/one.jsonl") == TABLE
    assert rows("s3://data/more/*.jsonl") == TABLE * 2
    assert rows("s3://data/more") == TABLE * 2
    assert rows("s3://data/set/") == TABLE
    assert account("s3://data/set").skipped == {
        "hidden or of the system": 1, "about the files beside it": 1, "of another split": 1,
    }  # fmt: skip
    with pytest.raises(NotFound, match="nothing"):
        rows("s3://data/none.jsonl")
    with pytest.raises(NotFound, match="nothing"):
        rows("s3://no-such-bucket/a.jsonl")


@pytest.mark.integration
@pytest.mark.usefixtures("credentials")
def test_wrong_credentials_of_s3_say_where_right_ones_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Invalid, match="AWS_ACCESS_KEY_ID") as caught:
        rows("s3://data/one.jsonl")
    assert "wrong" not in str(caught.value)


class Hub(Handler):
    """The few answers of a hub that reading one data set takes."""

    FILES = {"README.md": b"# about", "train.jsonl": LINES.encode()}  # noqa: RUF012

    def do_GET(self) -> None:
        """Answer about the data set someone/set, and refuse another one."""
        path = self.path.partition("?")[0]
        if "private" in path:
            self.answer(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            name = path.rpartition("/")[2]
            raw = self.FILES.get(name)
            head = {"X-Repo-Commit": "0" * 40, "ETag": '"abc"'}
            self.answer(200 if raw is not None else 404, raw or b"", head)
        elif "/tree/" in path or "/paths-info/" in path:
            listed = [self.entry(name) for name in self.FILES]
            asked = path.partition("/tree/")[2].partition("/")[2]
            self.answer(*((404, b"{}") if asked and asked != "" else (200, json.dumps(listed).encode())))
        else:
            listed = [{"rfilename": name} for name in self.FILES]
            about = {
                "id": "someone/set",
                "_id": "1",
                "sha": "0" * 40,
                "private": False,
                "tags": [],
                "downloads": 0,
                "siblings": listed,
            }
            self.answer(200, json.dumps(about).encode())

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        """Answer about paths."""
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(200, json.dumps([self.entry(name) for name in self.FILES if name in asked]).encode())

    def entry(self, name: str) -> dict[str, object]:
        """A file as a listing shows it."""
        return {"type": "file", "oid": "1" * 40, "size": len(self.FILES[name]), "path": name}

    def answer(self, code: int, body: bytes, head: dict[str, str] | None = None) -> None:
        """Send an answer."""
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(head or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


READ = """
import sys
from connito.data.reading.texts import read_texts
from connito.errors import ConnitoError
try:
    print(sum(1 for _ in read_texts(sys.argv[1:])))
except ConnitoError as error:
    print(type(error).__name__, error)
"""


def test_a_data_set_of_a_hub(tmp_path: Path) -> None:
    with serving(tmp_path, Hub) as url:

        def read(location: str) -> str:
            # In a process of its own: the hub's library takes its address from there, once, when it is imported.
            done = subprocess.run(
                [sys.executable, "-c", READ, location],
                env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                check=True,
            )
            return done.stdout.strip()

        assert read("hf://datasets/someone/set") == str(len(TABLE))
        assert read("hf://datasets/someone/set/train.jsonl") == str(len(TABLE))
        refused = read("hf://datasets/someone/private")
        assert refused.startswith("Invalid hf://datasets/someone/private may not be read")
        assert "HF_TOKEN" in refused

"""Credentials from an identity: asked for when they are needed, renewed when they end, in every signature."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from connito.errors import Fatal, Retry
from connito.runtime.settings import ServiceSettings
from connito.store.artifacts import ArtifactStore
from connito.store.credentials import provider
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from minio.credentials import StaticProvider

ANSWER = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>KEY{n}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>
<SessionToken>session{n}</SessionToken><Expiration>{until}</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


class Sts:
    """An STS that notes what it was asked and lets its credentials live for `seconds`."""

    def __init__(self) -> None:
        asked: list[dict[str, list[str]]] = []
        self.asked, self.seconds = asked, 3600
        sts = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(parse_qs(urlsplit(self.path).query))
                until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=sts.seconds)
                body = ANSWER.format(n=len(asked), until=until.strftime("%Y-%m-%dT%H:%M:%SZ")).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def sts() -> Iterator[Sts]:
    running = Sts()
    yield running
    running.server.shutdown()
    running.server.server_close()


def settings(tmp_path: Path, **values: str) -> ServiceSettings:
    (tmp_path / "token").write_text("a.projected.token\n")
    given = {"key_file": tmp_path / "key", "s3_token_file": tmp_path / "token", "cache_dir": tmp_path / "cache"}
    return ServiceSettings.model_validate({**given, **values})


def test_a_token_becomes_credentials_that_every_signature_carries(sts: Sts, tmp_path: Path) -> None:
    store = ArtifactStore.from_settings(settings(tmp_path, s3_credentials="web-identity", s3_sts_endpoint=sts.url))
    ref = ArtifactRef(digest="a" * 64, size=3, realm=REALM_PUBLIC)
    queries = [parse_qs(urlsplit(store.presign_get(ref, 60)).query) for _ in range(2)]
    assert [query["X-Amz-Security-Token"] for query in queries] == [["session1"]] * 2
    assert queries[0]["X-Amz-Credential"][0].startswith("KEY1/")
    (asked,) = sts.asked
    assert asked["WebIdentityToken"] == ["a.projected.token"]


def test_credentials_that_end_are_asked_for_again(sts: Sts, tmp_path: Path) -> None:
    sts.seconds = 0
    found = provider(settings(tmp_path, s3_credentials="web-identity", s3_sts_endpoint=sts.url))
    assert found is not None
    assert [found.retrieve().access_key for _ in range(2)] == ["KEY1", "KEY2"]


def test_without_an_sts_or_a_token_the_service_waits_or_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="CONNITO_S3_STS_ENDPOINT"):
        provider(settings(tmp_path, s3_credentials="web-identity"))
    away = provider(settings(tmp_path, s3_credentials="web-identity", s3_sts_endpoint="http://127.0.0.1:9"))
    assert away is not None
    (tmp_path / "token").unlink()
    with pytest.raises(Retry, match="no credentials for the store"):
        away.retrieve()


def test_aws_s_own_identity_is_read_from_where_the_cluster_puts_it(
    sts: Sts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/connito")
    found = provider(settings(tmp_path, s3_credentials="iam"))
    assert found is not None
    found._source._custom_endpoint = sts.url
    assert found.retrieve().session_token == "session1"
    assert sts.asked[0]["RoleArn"] == ["arn:aws:iam::1:role/connito"]


def test_keys_are_the_default(tmp_path: Path) -> None:
    assert provider(settings(tmp_path)) is None
    assert isinstance(provider(settings(tmp_path, s3_access_key="a", s3_secret_key="b")), StaticProvider)

"""The store's ports as somebody without credentials finds them: nothing is read, listed, written or removed through any."""

from __future__ import annotations

import http.client
import io
from contextlib import closing

import grpc
import pytest
from connito.platform.servers import ObjectStore
from minio import Minio

pytestmark = pytest.mark.integration

BUCKET, KEY, SECRET = "guarded", "holdout/text", b"held-out text of a clinic"
WEB = [
    ("filer", "GET", "/buckets/?limit=5"),
    ("filer", "GET", f"/buckets/{BUCKET}/{KEY}"),
    ("filer", "PUT", f"/buckets/{BUCKET}/{KEY}"),
    ("filer", "POST", f"/buckets/{BUCKET}/other"),
    ("filer", "DELETE", f"/buckets/{BUCKET}?recursive=true"),
    ("filer", "GET", "/etc/iam/identities"),
    ("master", "GET", "/dir/assign"),
    ("master", "GET", "/dir/lookup?volumeId=1"),
    ("master", "GET", "/dir/lookup?fileId=1,01637037d6&read=yes"),
    ("master", "GET", f"/col/delete?collection={BUCKET}"),
    ("master", "GET", "/vol/status"),
    ("volume", "GET", "/1,01637037d6"),
    ("volume", "DELETE", "/1,01637037d6"),
    ("volume", "GET", "/ui/index.html"),
    ("s3", "GET", "/"),
    ("s3", "GET", f"/{BUCKET}?list-type=2"),
    ("s3", "GET", f"/{BUCKET}/{KEY}"),
    ("s3", "PUT", f"/{BUCKET}/{KEY}"),
    ("s3", "POST", "/?Action=CreateUser&UserName=me&Version=2010-05-08"),
]
CALLS = [
    "filer_pb.SeaweedFiler/ListEntries", "filer_pb.SeaweedFiler/LookupDirectoryEntry", "filer_pb.SeaweedFiler/DeleteEntry",
    "filer_pb.SeaweedFiler/Statistics", "master_pb.Seaweed/VolumeList", "master_pb.Seaweed/Assign",
    "volume_server_pb.VolumeServer/VolumeServerStatus", "volume_server_pb.VolumeServer/ReadAllNeedles",
    "messaging_pb.SeaweedS3IamCache/PutIdentity",
]  # fmt: skip


@pytest.fixture(scope="module")
def client(object_store: ObjectStore) -> Minio:
    host = f"127.0.0.1:{object_store.ports['s3']}"
    found = Minio(host, access_key=object_store.access_key, secret_key=object_store.secret_key, secure=False)
    found.make_bucket(BUCKET)
    found.put_object(BUCKET, KEY, io.BytesIO(SECRET), len(SECRET))
    return found


@pytest.mark.parametrize(("part", "method", "path"), WEB)
def test_http_answers_nobody(object_store: ObjectStore, client: Minio, part: str, method: str, path: str) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", object_store.ports[part], timeout=5)) as connection:
        connection.request(method, path, body=b"evil" if method in ("PUT", "POST") else None)
        with connection.getresponse() as response:
            body = response.read()
    assert 400 <= response.status < 500, (response.status, body[:200])
    assert SECRET not in body
    with client.get_object(BUCKET, KEY) as stored:
        assert stored.read() == SECRET


@pytest.mark.parametrize("part", ["filer", "master", "volume", "s3"])
@pytest.mark.parametrize("call", CALLS)
def test_grpc_answers_nobody(object_store: ObjectStore, part: str, call: str) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{object_store.ports[f'{part}.grpc']}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream(f"/{call}", None, None)(b"", timeout=5))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE, "not even which calls there are"


def test_the_parts_keep_their_keys_to_themselves(object_store: ObjectStore) -> None:
    for name in ("security.toml", "parts.key", "parts.pem", "s3.json"):
        assert (object_store.data_dir / name).stat().st_mode & 0o077 == 0

"""Each role's credentials at a real gateway: what its work is on, and nothing else."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import http.client
import io
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote, urlsplit

import pytest
from connito.errors import Invalid
from connito.platform.servers import ObjectStore
from connito.platform.session import BUCKET, REGION
from connito.platform.store_rights import RIGHTS, Holder, holders, identities
from connito.store import ArtifactStore, key_of, ref_of_bytes
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, REALM_SUBMISSION, Realm

pytestmark = pytest.mark.integration

REALMS = {"public": REALM_PUBLIC, "holdout": REALM_HOLDOUT, "submissions": REALM_SUBMISSION}
HOLDERS = holders("connito", "the operator's secret", {role: role for role in (*RIGHTS, "customer", "miner")})


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    folder, operator = tmp_path_factory.mktemp("weed"), HOLDERS["operator"]
    with ObjectStore(folder, operator.access, operator.secret, identities=identities(HOLDERS)) as server:
        yield server


def store_of(server: ObjectStore, holder: Holder, folder: Path) -> ArtifactStore:
    return ArtifactStore(server.url, holder.access, holder.secret, BUCKET, REGION, folder)


async def allowed(store: ArtifactStore, realm: Realm.ValueType, *, write: bool, body: bytes) -> bool:
    try:
        if write:
            await store._call(
                "put", "x", lambda: store._client.put_object(BUCKET, _key(realm, body), io.BytesIO(body), len(body))
            )
        else:
            await store._call("get", "x", lambda: store._read(_key(realm, b"seen"), 0, 0, 10))
    except Invalid:
        return False
    return True


def _key(realm: Realm.ValueType, body: bytes) -> str:
    return key_of(ref_of_bytes(body, "", realm))


def test_miners_and_customers_hold_nothing_and_no_two_hold_the_same() -> None:
    assert set(HOLDERS) == {"operator", "selector", "committer", "validator", "aggregator", "library", "console"}
    assert len({holder.secret for holder in HOLDERS.values()}) == len(HOLDERS)
    assert len({holder.access for holder in HOLDERS.values()}) == len(HOLDERS)


async def test_each_role_reads_and_writes_what_its_work_is_on(guarded: ObjectStore, tmp_path: Path) -> None:
    operator = store_of(guarded, HOLDERS["operator"], tmp_path / "operator")
    await operator.ensure_bucket()
    for realm in REALMS.values():
        await operator.put_bytes(b"seen", "text/plain", realm)
    for name, holder in HOLDERS.items():
        if name == "operator":
            continue
        store = store_of(guarded, holder, tmp_path / name)
        reads, writes = RIGHTS[name]
        for realm_name, realm in REALMS.items():
            assert await allowed(store, realm, write=False, body=b"") == (realm_name in reads), (name, realm_name)
            put = await allowed(store, realm, write=True, body=name.encode())
            assert put == (realm_name in writes), (name, realm_name)
        client = store._client
        with pytest.raises(Invalid, match="denies"):
            await store._call("list", "x", partial(list, client.list_objects(BUCKET, recursive=True)))
        with pytest.raises(Invalid, match="denies"):
            await store._call("remove", "x", partial(client.remove_bucket, BUCKET))
        if "public" in reads:
            # Of a reader without the right to list, too, what is not there is missing and not forbidden.
            assert await store.stat(ref_of_bytes(b"never stored", "", REALM_PUBLIC)) is None


async def test_no_role_makes_itself_or_others_more(guarded: ObjectStore, tmp_path: Path) -> None:
    store = store_of(guarded, HOLDERS["aggregator"], tmp_path)
    for name in ("another", "iam"):
        with pytest.raises(Invalid, match="denies"):
            await store._call("make", "x", partial(store._client.make_bucket, f"{name}-bucket"))


def sent(
    server: ObjectStore,
    who: str,
    method: str,
    path: str,
    query: str = "",
    headers: Mapping[str, str] = MappingProxyType({}),
    body: bytes = b"",
) -> tuple[int, bytes]:
    """Send a request signed as a role, with a path that goes over the wire as it is written, however odd."""
    holder, now = HOLDERS[who], datetime.datetime.now(datetime.UTC)
    stamp, day, host = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d"), urlsplit(server.url).netloc
    signed = {"host": host, "x-amz-date": stamp, "x-amz-content-sha256": hashlib.sha256(body).hexdigest(), **headers}
    names, scope = ";".join(sorted(signed)), f"{day}/{REGION}/s3/aws4_request"
    lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    canonical = "\n".join([method, path, query, lines, names, signed["x-amz-content-sha256"]])
    key = f"AWS4{holder.secret}".encode()
    for part in (day, REGION, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
    signed["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={holder.access}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.putrequest(method, f"{path}?{query}" if query else path, skip_host=True, skip_accept_encoding=True)
        for name, value in signed.items():
            connection.putheader(name, value)
        connection.putheader("content-length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 16)
    finally:
        connection.close()


PATHS = [
    "{key}", "public/../{key}", "public/%2e%2e/{key}", "public/..%2f{key}", "public//../{key}", "./{key}", "/{key}",
    "public/./../{key}", "public/x/../../{key}", "public\\..\\{key}", "PUBLIC/../{key}", "public/%252e%252e/{key}",
    "public/..;/{key}", "public%2f..%2f{key}", "{key}%00", "public/%00/../{key}", "{key}/", "{key}/.", "public/..%5c{key}",
]  # fmt: skip
SUBRESOURCES = ["acl=", "tagging=", "retention=", "legal-hold=", "attributes=", "versionId=null", "partNumber=1"]
OF_BUCKET = [
    "policy=",
    "acl=",
    "tagging=",
    "versioning=",
    "lifecycle=",
    "cors=",
    "ownershipControls=",
    "uploads=",
    "versions=",
]


async def test_no_way_of_writing_a_path_or_a_request_opens_another_realm(guarded: ObjectStore, tmp_path: Path) -> None:
    operator, secret = store_of(guarded, HOLDERS["operator"], tmp_path), b"SECRET of a hold-out"
    await operator.ensure_bucket()
    key = key_of(await operator.put_bytes(secret, "text/plain", REALM_HOLDOUT))
    where = f"/{BUCKET}/"
    for who in ("library", "console"):
        asked = [sent(guarded, who, "GET", where + path.format(key=key)) for path in PATHS]
        asked += [sent(guarded, who, method, where + key, query) for method in ("GET", "PUT") for query in SUBRESOURCES]
        asked += [sent(guarded, who, method, f"/{BUCKET}", query) for method in ("GET", "PUT") for query in OF_BUCKET]
        for source in (where + key, f"{BUCKET}/{key}", where + quote(key, safe=""), f"{where}public/../{key}"):
            asked.append(sent(guarded, who, "PUT", where + "public/taken", headers={"x-amz-copy-source": source}))
            asked.append(sent(guarded, who, "GET", where + "public/taken"))
        for action in ("CreateAccessKey&UserName=operator", "AssumeRole&RoleArn=x&RoleSessionName=y", "PutUserPolicy"):
            asked.append(sent(guarded, who, "POST", "/", body=f"Action={action}&Version=2010-05-08".encode()))
        asked += [
            sent(guarded, who, "DELETE", where + key),
            sent(guarded, who, "DELETE", f"{where}public/../{key}"),
            sent(guarded, who, "PUT", f"{where}public/../{key}", body=b"mine"),
            sent(guarded, who, "PUT", where + key, body=b"mine"),
            sent(guarded, who, "PUT", "/another"),
        ]
        assert len(asked) > 60
        for place, (status, said) in enumerate(asked):
            assert status >= 400, (who, place, said[:200])
            assert secret not in said, (who, place)
        body = f"<Delete><Object><Key>{key}</Key></Object></Delete>".encode()
        assert b"AccessDenied" in sent(guarded, who, "POST", f"/{BUCKET}", "delete=", body=body)[1]
    assert sent(guarded, "operator", "GET", where + key) == (200, secret)


async def test_who_writes_a_realm_can_take_from_it_too_and_nobody_else(guarded: ObjectStore, tmp_path: Path) -> None:
    """The gateway knows no right to write without one to remove: ADR 19 says so, and readers notice."""
    operator = store_of(guarded, HOLDERS["operator"], tmp_path)
    await operator.ensure_bucket()
    for realm in REALMS.values():
        key = key_of(await operator.put_bytes(b"kept", "text/plain", realm))
        for who, (_, writes) in RIGHTS.items():
            if who in HOLDERS and key.partition("/")[0] not in writes:
                assert sent(guarded, who, "DELETE", f"/{BUCKET}/{key}")[0] == 403, (who, key)
        assert sent(guarded, "operator", "GET", f"/{BUCKET}/{key}") == (200, b"kept")

"""Each role's credentials at a real gateway: what its work is on, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

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

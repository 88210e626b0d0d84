"""One bucket, one platform: on a real store, and in the services' processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from connito.bus import Bus
from connito.client import cleaning
from connito.errors import Fatal
from connito.platform.servers import NatsServer, ObjectStore
from connito.platform.session import BUCKET
from connito.platform.store_rights import identities as identities_of
from connito.store import ArtifactStore, owner
from connito.store.owner import KEY, _read, claim
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.wire.identity import Identity
from connito.wire.roster import OPERATOR, ROLES, Roster

from tests.integration.test_selector import store_env
from tests.integration.test_store_rights import HOLDERS, store_of
from tests.integration.witness import ServiceProcess
from tests.support.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.integration
SHARED = Identity.generate().public


def platform() -> Roster:
    """A roster of new keys, and a customer and a validator who are others' too."""
    keys = {role: frozenset({Identity.generate().public}) for role in (OPERATOR, *ROLES)}
    return Roster({**keys, "customer": frozenset({SHARED}), "validator": frozenset({SHARED})})


def marked(store: ArtifactStore) -> bool:
    return bool(_read(store))


async def refused(store: ArtifactStore, roster: Roster) -> bool:
    (found,) = await asyncio.gather(claim(store, roster, first=True), return_exceptions=True)
    assert found is None or (
        isinstance(found, Fatal) and store.bucket in str(found) and "CONNITO_S3_BUCKET" in str(found)
    )
    return found is not None


async def test_of_platforms_that_come_at_once_one_has_the_bucket(store: ArtifactStore) -> None:
    await claim(store, platform(), first=False)
    assert not marked(store), "who only looks takes nothing"
    rosters = [platform() for _ in range(8)]
    answers = await asyncio.gather(*(refused(store, roster) for roster in rosters))
    assert answers.count(False) == 1
    own = rosters[answers.index(False)]
    assert [await refused(store, roster) for roster in rosters] == answers
    with pytest.raises(Fatal, match="another platform's"):
        await claim(store, rosters[answers.index(True)], first=False)
    # Keys change one by one, or all at once where the old ones are retired.
    turned = replace(platform(), retired=dict.fromkeys(own.keys["committer"], ("committer", 1)))
    assert not await refused(store, turned)
    assert not await refused(store, replace(turned, retired={})), "it holds the newest keys"
    assert await refused(store, own)
    store._client._put_object(store.bucket, KEY, b"[")
    with pytest.raises(Fatal, match=KEY):
        await claim(store, own, first=True)
    await store.remove(KEY, 0.0)
    assert not await refused(store, own)


async def test_who_looked_before_the_first_had_written_comes_second_all_the_same(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = platform(), platform()
    await claim(store, first, first=True)
    looks = iter([b""])
    monkeypatch.setattr(owner, "_read", lambda *given: b"" if next(looks, None) is not None else _read(*given))
    assert await refused(store, second)
    assert not await refused(store, first)


def test_tidying_takes_nothing_from_another_platform(
    store: ArtifactStore, own_nats: NatsServer, identities: dict[str, Identity], roster: Roster
) -> None:
    def session() -> Any:
        @asynccontextmanager
        async def bus() -> AsyncIterator[Bus]:
            async with await Bus.connect(own_nats.url, identities["coordinator"], "test", roster) as connected:
                yield connected

        return SimpleNamespace(store=lambda: store, roster=roster, bus=bus)

    async def stocked() -> ArtifactRef:
        await claim(store, platform(), first=True)
        return await store.put_bytes(b"theirs", "text/plain", REALM_PUBLIC)

    async def there() -> tuple[int | None, bool]:
        return await store.stat(ref), marked(store)

    ref = asyncio.run(stocked())
    with pytest.raises(Fatal, match="another platform's"):
        cleaning.clean(session(), older_than_s=0.0, remove=True)
    assert asyncio.run(there()) == (6, True)
    asyncio.run(store.remove(KEY, 0.0))
    asyncio.run(claim(store, roster, first=True))
    cleaning.clean(session(), older_than_s=0.0, remove=True)
    # Of the mark itself nothing is tidied.
    assert asyncio.run(there()) == (None, True)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    folder, operator = tmp_path_factory.mktemp("weed"), HOLDERS["operator"]
    with ObjectStore(folder, operator.access, operator.secret, identities=identities_of(HOLDERS)) as server:
        yield server


async def test_each_role_may_look_with_what_it_has_and_the_committer_mark(guarded: ObjectStore, tmp_path: Path) -> None:
    await store_of(guarded, HOLDERS["operator"], tmp_path).ensure_bucket()
    ours = platform()
    for role, holder in HOLDERS.items():
        await claim(store_of(guarded, holder, tmp_path / role), ours, first=False)
    await claim(store_of(guarded, HOLDERS["committer"], tmp_path / "mark"), ours, first=True)
    for role, holder in HOLDERS.items():
        with pytest.raises(Fatal, match=BUCKET):
            await claim(store_of(guarded, holder, tmp_path / role), platform(), first=False)


@pytest.mark.parametrize("name", ["committer", "library"])
async def test_a_service_of_another_platform_ends_with_cause_and_remedy(
    name: str, own_nats: NatsServer, object_store: ObjectStore, store: ArtifactStore, tmp_path: Path,
    identities: dict[str, Identity], roster: Roster,
) -> None:  # fmt: skip
    env = {"CONNITO_NATS_URL": own_nats.url, **store_env(object_store, store)}
    first = ServiceProcess(name, tmp_path / "first", identities[name], roster, env)
    try:
        await first.start().ready()
        if name != "committer":
            await claim(store, roster, first=True)
        await asyncio.to_thread(wait_until, lambda: marked(store))
    finally:
        first.kill()
    other = platform()
    key = Identity.generate()
    second = ServiceProcess(
        name, tmp_path / "second", key, replace(other, keys={**other.keys, name: frozenset({key.public})}), env
    )
    try:
        process = second.start().process
        assert process is not None
        assert await asyncio.to_thread(process.wait, PATIENCE) == Fatal.exit_code
        assert f"{name}: the bucket {store.bucket}" in second.log.read_text().splitlines()[-1]
    finally:
        second.kill()

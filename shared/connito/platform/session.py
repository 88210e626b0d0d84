"""Connection of commands to a platform: from the environment, or from the data directory of `connito up`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from connito.errors import Invalid, NotFound
from connito.platform.datadir import DataDir, Platform
from connito.platform.membership import Membership
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.tls import PLAIN, Tls

if TYPE_CHECKING:
    from connito.bus import Bus
    from connito.store import ArtifactStore


@dataclass(frozen=True)
class Session:
    """An identity and the broker's address. `data` and `platform` are None for an installation elsewhere.

    `resting`: no service runs; broker and store are there for reading alone.
    """

    nats_url: str
    identity: Identity
    roster: Roster
    data: DataDir | None = None
    platform: Platform | None = None
    tls: Tls = PLAIN
    resting: bool = False

    @classmethod
    def open(cls, data_dir: Path | None, *, role: str, wake: bool = False) -> Self:
        """Return the installation that `CONNITO_NATS_URL`, `CONNITO_KEY_FILE` and `CONNITO_ROSTER` name, where the first is set
        or the key file is a miner's that was told the rest, and no folder was named. Else return the platform of the data
        directory, as its `role`. Raises `NotFound` when none runs there.

        With `wake`, for who reads only: where none runs, start broker and store of the one that rests there.
        """
        if (elsewhere := cls._elsewhere(data_dir)) is not None:
            return elsewhere
        data = DataDir.at(data_dir)
        try:
            platform, resting = _platform(data, wake=wake)
        except NotFound as error:
            if data_dir is None and "CONNITO_KEY_FILE" in os.environ:
                lacking = (
                    "there is a key, CONNITO_KEY_FILE, and no address: set CONNITO_NATS_URL to that of its platform"
                )
                raise NotFound(f"{lacking}; here {error}") from error
            raise
        identity = Identity.load(data.keys / f"{role}.nk")
        return cls(platform.nats_url, identity, Roster.load(data.roster), data, platform, resting=resting)

    @classmethod
    def _elsewhere(cls, data_dir: Path | None) -> Self | None:
        key = os.environ.get("CONNITO_KEY_FILE", "")
        told = Membership.of(Path(key)) if key else Membership()
        url = os.environ.get("CONNITO_NATS_URL", "") or told.bus
        if not url or data_dir is not None:
            return None
        return cls(
            url,
            Identity.load(_path("CONNITO_KEY_FILE")),
            Roster.load(_path("CONNITO_ROSTER", told.roster)),
            tls=Tls.from_environment(os.environ),
        )

    @classmethod
    def acting(cls, data_dir: Path | None) -> tuple[str, frozenset[str]]:
        """Return the customer's key that `open` would act with, and its organisations; also where nothing runs. Nobody's where
        there is none.
        """
        # Who has named no key is nobody, and may still use what lies here.
        found = cls._elsewhere(data_dir) if os.environ.get("CONNITO_KEY_FILE") else None
        data = DataDir.at(data_dir)
        if found is not None:
            return found.identity.public, found.roster.memberships(found.identity.public)
        mine = data.keys / "customer.nk"
        if not mine.is_file():
            return "", frozenset()
        key = Identity.load(mine).public
        return key, Roster.load(data.roster).memberships(key) if data.roster.is_file() else frozenset()

    @asynccontextmanager
    async def bus(self) -> AsyncIterator[Bus]:
        """Yield a connection to the broker. Raises `Retry` when it is away."""
        from connito.bus import Bus
        from connito.runtime.logs import quiet

        quiet()
        async with await Bus.connect(self.nats_url, self.identity, "cli", self.roster, self.tls) as bus:
            yield bus

    async def endpoints(self, *names: str) -> dict[str, str]:
        """Return the addresses of the services' APIs."""
        async with self.bus() as bus:
            return {name: await bus.find_endpoint(name, timeout=5.0) for name in names}

    @property
    def cache_dir(self) -> Path:
        """Return where artifacts of this platform are kept: with what its services fetched, where it runs here."""
        from connito.runtime.settings import default_cache_dir

        if self.data is not None:
            return self.data.cache
        return Path(os.environ.get("CONNITO_CACHE_DIR") or default_cache_dir())

    @property
    def has_store(self) -> bool:
        """Return whether there is something to reach the store with: elsewhere, a miner has no credentials for it."""
        own = os.environ.get("CONNITO_S3_ACCESS_KEY") or os.environ.get("CONNITO_S3_CREDENTIALS", "keys") != "keys"
        return self.platform is not None or bool(own)

    def direct(self) -> ArtifactStore | None:
        """Return the store itself where no service is there to sign addresses for it."""
        return self.store() if self.resting else None

    def store(self) -> ArtifactStore:
        """Return the artifact store. Raises `Fatal` without credentials for it."""
        from connito.store import ArtifactStore

        platform, data = self.platform, self.data
        if platform is None or data is None:
            from connito.runtime.settings import ServiceSettings

            return ArtifactStore.from_settings(ServiceSettings.load(), self.identity)
        return local_store(platform, data)


def _platform(data: DataDir, *, wake: bool) -> tuple[Platform, bool]:
    """Return the platform that runs in a folder, else with `wake` the one that rests there, and which of both it is."""
    from connito.platform.resting import rests
    from connito.platform.resting import wake as awake

    try:
        return data.running(), False
    except NotFound:
        if not wake or not rests(data):
            raise
        return awake(data), True


def local_store(platform: Platform, data: DataDir) -> ArtifactStore:
    """Return the store that `connito up` runs."""
    from connito.store import ArtifactStore
    from connito.store.keyring import Keyring

    # Whose folder it is has the operator's credentials for the store, and its key.
    keys = Keyring(Identity.load(data.keys / "operator.nk"))
    return ArtifactStore(
        platform.s3_endpoint, platform.s3_access_key, platform.s3_secret_key, BUCKET, REGION, data.cache, keys=keys
    )


BUCKET, REGION = "connito", "us-east-1"


def _path(variable: str, otherwise: str = "") -> Path:
    value = os.environ.get(variable, "") or otherwise
    if not value:
        raise Invalid(f"CONNITO_NATS_URL is set, but {variable} is not; set it to the file's path")
    return Path(value)

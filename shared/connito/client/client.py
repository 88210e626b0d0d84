"""`connito.Client`: a platform from a script, without asyncio."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from connito.client.aio import Aio
from connito.client.connection import Connection
from connito.client.jobs import Jobs, RestingJobs
from connito.client.library import Library
from connito.errors import Invalid, NotFound
from connito.platform.datadir import DataDir
from connito.runtime.tasks import blocking
from connito.v1 import services_pb2
from connito.v1.run_pb2 import BanOrder
from connito.wire.identity import Identity, short_key
from connito.wire.tls import PLAIN, Tls


class Client:
    """A connection to a platform's APIs: `job` and `library` have the verbs of `connito job` and `connito library`.

    Reading needs addresses only; creating and cancelling runs needs the key of a customer in the operator's roster.
    Every method raises `Retry` when the service is away, `NotFound` and `Invalid` as the service says.
    """

    job: Jobs
    library: Library

    def __init__(
        self,
        coordinator: str = "",
        library: str = "",
        identity: Identity | None = None,
        tls: Tls = PLAIN,
        token: str = "",
    ) -> None:
        """Connect to `coordinator` and `library` (`host:port`) as `tls` says. `token`: an identity provider's, to read with."""
        addresses = {"coordinator": coordinator, "library": library}

        def find(service: str) -> str:
            if not addresses[service]:
                raise Invalid(
                    f"this client has no address of the {service}: pass {service}='host:port', or use Client.local()"
                )
            return addresses[service]

        self._use(Connection(find, identity, tls, token), None)

    def __repr__(self) -> str:
        identity = self._connection._identity
        return f"<Client, {'without a key' if identity is None else f'as {short_key(identity.public)}'}>"

    @classmethod
    def local(cls, data_dir: Path | str | None = None, role: str = "customer") -> Self:
        """Return a client, as the customer or another `role`, of the platform that `connito up` runs on this machine, or
        of the one that CONNITO_NATS_URL names, with the key in CONNITO_KEY_FILE.

        Where none runs, what reads reads the one that rests in the folder, as an ended `connito up` left it, and what writes
        raises `NotFound`. Raises that at once where nothing was ever run."""

        from connito.platform.resting import rests
        from connito.platform.session import Session

        folder, client = None if data_dir is None else Path(data_dir), cls.__new__(cls)
        try:
            session = Session.open(folder, role=role)
        except NotFound as error:
            if not rests(data := DataDir.at(folder)):
                raise
            client._rest(data, Identity.load(data.keys / f"{role}.nk"), str(error))
            return client

        def find(service: str) -> str:
            return blocking(session.endpoints(service))[service]

        client._use(Connection(find, session.identity, session.tls), folder)
        return client

    def _rest(self, data: DataDir, identity: Identity, why: str) -> None:
        from connito.client.resting import RestingLibrary

        def find(service: str) -> str:
            raise NotFound(why)

        self._connection = Connection(find, identity, PLAIN)
        self.job = RestingJobs(self._connection, data.root)
        self.library = RestingLibrary(self._connection, data, identity)

    def _use(self, connection: Connection, data_dir: Path | None) -> None:
        self._connection = connection
        self.job, self.library = Jobs(connection, data_dir), Library(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def aio(self) -> Aio:
        """Return the same verbs to be awaited, over the same connections: `await client.aio.job.list()`."""
        return Aio(self)

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def ban(self, miner: str, why: str, run: str = "", *, lifted: bool = False) -> list[str]:
        """Ban a miner from one run or, as an operator, from every run; or lift that. Returns the runs it stands in.

        `miner`: its public key, or a beginning that only one miner's has. Raises `NotFound` for an unknown run or miner,
        `Invalid` when this key may not order it.
        """
        order = BanOrder(run=run, miner=self.job.miner(miner), lifted=lifted, why=why)
        request = services_pb2.BanMinerRequest(envelope=self._connection.seal("rpc.BanMiner", order))
        return [*self._connection.call("coordinator", "BanMiner", request).runs]

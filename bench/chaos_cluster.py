"""`connito up` over a broker of three nodes that keep every stream three times: `python -m bench.chaos_cluster OPTIONS`, as JSON.

A node that dies is started again. Their process ids are in `nats/nodes.json` of the data directory. Services stay up when the run
has ended, until SIGTERM.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

from connito.bus import streams
from connito.errors import ConnitoError, Retry
from connito.files import write_durably
from connito.local import installation, up
from connito.platform.accounts import Accounts
from connito.platform.servers import START_SECONDS, NatsServer, free_ports
from connito.runtime.progress import Notify

NODES, LOOK_SECONDS = 3, 0.2


class Node(NatsServer):
    """One server of the cluster."""

    def __init__(self, folder: Path, number: int, ports: list[tuple[int, int, int]], accounts: Accounts | None) -> None:
        super().__init__(folder / f"node-{number}", ports[number][0], accounts)
        self._number, self._route, self.monitor = number, ports[number][1], ports[number][2]
        self._routes = [f"nats://127.0.0.1:{route}" for _, route, _ in ports]

    def _own_name(self) -> str:
        # A node that comes back under another name is one more peer to its cluster, and the old one is missed for ever.
        return f"connito-local-node-{self._number}"

    def _config(self) -> dict[str, Any]:
        cluster = {"name": "chaos", "listen": f"127.0.0.1:{self._route}", "routes": self._routes}
        return super()._config() | {"cluster": cluster, "http": f"127.0.0.1:{self.monitor}"}


class Cluster(NatsServer):
    """Three nodes that look like one server to whoever supervises it."""

    def __init__(
        self, data_dir: Path, port: int = 0, accounts: Accounts | None = None, log_file: Path | None = None
    ) -> None:
        super().__init__(data_dir, port, accounts, log_file)
        free = free_ports(3 * NODES)
        ports = [(free[3 * n], free[3 * n + 1], free[3 * n + 2]) for n in range(NODES)]
        self.nodes = [Node(data_dir, number, ports, accounts) for number in range(NODES)]
        self._over, self._noting = threading.Event(), threading.Lock()

    @property
    def url(self) -> str:
        """Return the addresses of all nodes."""
        return ",".join(node.url for node in self.nodes)

    @property
    def running(self) -> bool:
        """Return whether the cluster is kept alive."""
        return not self._over.is_set()

    def start(self, progress: Notify | None = None) -> Self:
        """Start all nodes at once, and keep each alive from then on, whatever becomes of the others."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(NODES) as pool:
            list(pool.map(Node.start, self.nodes))
        self.process = self.nodes[0].process
        give_up = time.monotonic() + START_SECONDS
        while behind := [problem for node in self.nodes if (problem := lag(node.monitor))]:
            if time.monotonic() > give_up:
                raise Retry(f"the cluster is not ready: {behind}", dependency="broker")
            time.sleep(LOOK_SECONDS)
        self._note()
        for node in self.nodes:
            threading.Thread(target=self._keep, args=(node,), daemon=True).start()
        return self

    def stop(self, grace: float = 2.0) -> None:
        """End all nodes."""
        self._over.set()
        for node in self.nodes:
            node.stop(grace)

    def _keep(self, node: Node) -> None:
        while not self._over.wait(LOOK_SECONDS):
            if not node.running:
                with suppress(ConnitoError):
                    node.start()
                self._note()

    def _note(self) -> None:
        rows = [{"pid": node.pid, "monitor": node.monitor} for node in self.nodes if node.process is not None]
        with self._noting:
            write_durably(self.data_dir / "nodes.json", json.dumps(rows))


def lag(monitor: int) -> str:
    """Return what the node with this monitoring port is behind in; the empty string when it is current in everything."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{monitor}/healthz", timeout=2) as answer:
            return "" if answer.status == 200 else f"status {answer.status}"
    except OSError as error:
        return str(error)


def main() -> None:
    """Run as the process of `connito up --no-wait` does."""
    thrice = partial(streams.ensure, replicas=NODES)
    with patch.object(installation, "NatsServer", Cluster), patch.object(streams, "ensure", thrice):
        up.main()


if __name__ == "__main__":
    main()

"""A Flower job with a SuperLink and SuperNodes of its own: FOLDER NUMBERS WORKERS ROUNDS.

The server writes when it has averaged a round, to FOLDER/server.times.
"""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from socket import create_connection, socket

SERVER = """
import os, time
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        found = super().aggregate_train(server_round, replies)
        with open(os.environ["PEER_TIMES"], "a") as out:
            print(time.time(), file=out)
        return found

app = ServerApp()

@app.main()
def main(grid, context):
    workers, rounds = int(os.environ["PEER_WORKERS"]), int(os.environ["PEER_ROUNDS"])
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=workers, min_available_nodes=workers)
    numbers = np.zeros(int(os.environ["PEER_NUMBERS"]), np.float32)
    strategy.start(grid=grid, initial_arrays=ArrayRecord([numbers]), num_rounds=rounds)
"""
CLIENT = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)
"""
PROJECT = """
[project]
name = "echo"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "echo.server:app"
clientapp = "echo.client:app"
"""


def main() -> None:
    """Run the job to its end."""
    folder, numbers, workers, rounds = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    (folder / "app" / "echo").mkdir(parents=True)
    (folder / "app" / "pyproject.toml").write_text(PROJECT)
    for name, text in (("__init__", ""), ("server", SERVER), ("client", CLIENT)):
        (folder / "app" / "echo" / f"{name}.py").write_text(text)
    port, bin_folder = free_port(), Path(sys.executable).parent
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    times = folder / "server.times"
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PEER_TIMES": str(times),
        "PEER_WORKERS": str(workers),
        "PEER_ROUNDS": str(rounds + 1),
        "PEER_NUMBERS": str(numbers),
    }
    with ExitStack() as stack:

        def start(*command: str) -> None:
            process = subprocess.Popen(command, env=environment)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        start(
            str(bin_folder / "flower-superlink"),
            "--insecure",
            "--port",
            str(port),
            "--disable-runtime-dependency-installation",
        )
        wait_for(port)
        for _ in range(workers):
            server = ("--superlink", f"127.0.0.1:{port}")
            start(str(bin_folder / "flower-supernode"), "--insecure", *server, "--port", str(free_port()))
        subprocess.run((str(bin_folder / "flwr"), "run", str(folder / "app"), "here"), env=environment, check=True)
        while not times.exists() or len(times.read_text().split()) <= rounds:
            time.sleep(0.2)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until somebody listens."""
    while True:
        try:
            create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)


if __name__ == "__main__":
    main()

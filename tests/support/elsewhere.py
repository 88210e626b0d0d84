"""A person on a machine of their own: a key and an address, and no data directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
from connito.platform.datadir import DataDir
from connito.wire.identity import Identity

from tests.support.hub import TOKEN, Hub


class Elsewhere:
    """Commands of one who knows a platform by its address alone."""

    def __init__(self, folder: Path, identity: Identity, data: DataDir, inherited: Mapping[str, str]) -> None:
        folder.mkdir()
        self.folder, self.key = folder, identity.public
        identity.save(folder / "me.nk")
        shutil.copy(data.roster, folder / "roster.json")
        self.env = dict(inherited) | {
            "CONNITO_NATS_URL": data.running().nats_url, "CONNITO_KEY_FILE": str(folder / "me.nk"),
            "CONNITO_ROSTER": str(folder / "roster.json"), "CONNITO_CACHE_DIR": str(folder / "cache"),
            "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

    def connito(self, *arguments: object, hub: Hub | None = None) -> subprocess.CompletedProcess[str]:
        env = self.env | ({} if hub is None else {"HF_ENDPOINT": hub.endpoint})
        command = [sys.executable, "-m", "connito.cli", *map(str, arguments), "--json"]
        return subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, check=False, timeout=200
        )

    def json(self, *arguments: object, hub: Hub | None = None) -> Any:
        done = self.connito(*arguments, hub=hub)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    @contextmanager
    def serving(self, *arguments: object) -> Iterator[str]:
        """Serve, and yield the address once it is there."""
        command = [sys.executable, "-m", "connito.cli", "serve", "--port", "0", *map(str, arguments), "--json"]
        with subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield json.loads("".join(process.stdout.readline() for _ in range(3)))["address"]
            finally:
                process.terminate()


def models(address: str, key: str = "none") -> list[str]:
    """The names that a server tells a key."""
    answer = httpx.get(f"{address}/models", headers={"Authorization": f"Bearer {key}"}, timeout=60)
    return [model["id"] for model in answer.raise_for_status().json()["data"]]


def completed(address: str, model: str, key: str = "none") -> tuple[int, str]:
    """The status and the text, or the refusal, of a question to a server."""
    body = {"model": model, "prompt": "def ", "max_tokens": 4}
    asked = httpx.post(f"{address}/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=100)
    answer = asked.json()
    return asked.status_code, answer["error"]["message"] if "error" in answer else answer["choices"][0]["text"]

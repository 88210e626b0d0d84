"""The part of the base model that a miner needs, from wherever it is cheapest.

On the machine that holds the whole base in its cache, tensors are memory-mapped and shared by everybody there.
Elsewhere only byte ranges are fetched: the shared tensors, and the rows of the selected experts and of what is to stay
beside them, which is every expert where the memory is there (`connito.moe.residency`). The ranges are kept in the cache,
by content, for a restart and for other miners on the machine.
"""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.data.manifest import FileEntry, Manifest
from connito.errors import Retry, VerificationFailed
from connito.files import write_durably
from connito.moe.residency import HELPERS
from connito.wire.facts import RunFacts, experts_of

from .adapters import Downloads, RangeReader

if TYPE_CHECKING:
    from connito.moe.footprint import Workload
    from torch import Tensor, nn

# Ranges fetched at once, and files to lock of them.
CONNECTIONS, LOCKS = 8, 64


@dataclass(frozen=True)
class Base:
    """A base model that can be loaded for training: from `files` when all are on this machine, else through `ranges`."""

    manifest: Manifest
    files: Mapping[str, Path] | None
    ranges: Ranges | None
    background: Path | None = None

    @property
    def source(self) -> str:
        """Return the source of the bytes, for the log."""
        return "cached files" if self.files is not None else "byte ranges"

    @classmethod
    async def fetch(cls, facts: RunFacts, downloads: Downloads) -> Base:
        """Find out what is here and get the addresses of what is not."""
        path = await downloads.fetch(facts.run, facts.require_spec().base.manifest)
        manifest = Manifest.load(path)
        background = None
        if facts.selection is not None and facts.selection.HasField("background"):
            background = await downloads.fetch(facts.run, facts.selection.background)
        refs = {name: entry.ref for name, entry in manifest.files.items()}
        # In a thread: a file that was not verified yet is read once from front to back.
        cached = await asyncio.to_thread(lambda: {name: downloads.cached(ref) for name, ref in refs.items()})
        needed = ("config.json", *{tensor.file for tensor in manifest.tensors.values()})
        if all(cached[name] is not None for name in needed):
            files = {name: found for name, found in cached.items() if found is not None}
            return cls(manifest, files, None, background)
        urls = await downloads.urls(facts.run, [refs[name] for name in needed])
        ranges = Ranges(dict(zip(needed, urls, strict=True)), downloads.cache.folder / "ranges")
        return cls(manifest, None, ranges, background)

    def config(self) -> Any:
        """Return the model's configuration, with the type its weights are loaded in. Raises `Retry` when the store is away."""
        from connito.base.description import describe
        from connito.base.loading import manifest_file

        if self.files is not None:
            data = self.files["config.json"].read_bytes()
        else:
            assert self.ranges is not None
            try:
                data = manifest_file(self.manifest, self.ranges.read, "config.json")
            finally:
                self.ranges.close()
        return describe(data, self.manifest.headers(), self.manifest.extra.get("dtype", "")).plan()

    def load(
        self, facts: RunFacts, device: Any, work: Workload, state: Mapping[str, Tensor], *, top_k: int = 0
    ) -> nn.Module:
        """Return the training model, made ready for this machine. Blocking. Raises `Retry` when the store is away or
        damaged bytes came.

        work and top_k are the miner's own choice: what is resident and as what, and experts per token. state: the target rows
        to begin from, which the caller writes into the model before each cycle; the base's are not fetched.
        """
        from connito.moe.prepare import prepare
        from connito.moe.resident import add_background
        from connito.moe.state import load_state

        model = self._load(facts, work, state, top_k)
        if self.background is not None and work.residency == HELPERS:
            add_background(model, load_state(self.background))
        return prepare(model, work.engine, device)

    def _load(self, facts: RunFacts, work: Workload, state: Mapping[str, Tensor], top_k: int) -> nn.Module:
        from connito.base.loading import load_resident, load_resident_local

        selection = facts.require_selection()
        targets, helpers = experts_of(selection)
        mode = facts.require_spec().training.routing_mode or "natural"
        how: dict[str, Any] = {"top_k": top_k, "half": work.half, "residency": work.residency}
        how["routers"] = selection.routers
        if self.files is not None:
            return load_resident_local(self.files, targets, helpers, mode, **how)
        assert self.ranges is not None
        try:
            ahead = self.ranges.ahead
            return load_resident(
                self.manifest, self.ranges.read, targets, helpers, mode, state=state, ahead=ahead, **how
            )
        except VerificationFailed as error:
            # Whether the cache or the transfer was damaged, a fresh copy is the remedy.
            self.ranges.forget()
            raise Retry(
                f"a part of the base model was damaged and will be fetched again: {error}", after=2.0
            ) from error
        finally:
            self.ranges.close()


class Ranges:
    """Byte ranges of a base's files by presigned URL, each kept in `folder` under its file's digest and position.

    For several threads: each has a connection of its own to each file.
    """

    def __init__(self, urls: Mapping[str, str], folder: Path) -> None:
        self._urls, self._folder = urls, folder
        self._own = threading.local()
        self._readers: list[RangeReader] = []
        self._touched: set[Path] = set()
        self._fetching: ThreadPoolExecutor | None = None

    def ahead(self, ranges: Iterable[tuple[FileEntry, int, int]]) -> None:
        """Begin to fetch these, several at once. What cannot be fetched is told to whoever reads it."""
        self._fetching = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="ranges")
        for each in ranges:
            self._fetching.submit(self.read, *each)

    def read(self, entry: FileEntry, start: int, length: int) -> bytes:
        """Return these bytes of a file; `connito.data.manifest` checks their digest. Raises `Retry`."""
        if length == 0:
            return b""
        folder = self._folder / entry.digest
        path = folder / f"{start}-{length}"
        self._touched.add(folder)
        if path.exists():
            return path.read_bytes()
        folder.mkdir(parents=True, exist_ok=True)
        # Others on this machine wait for one who fetches the same; so many files are enough for whoever fetches at once.
        with (folder / f"lock{start // 8 % LOCKS}").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path.read_bytes()
            data = self._fetch(entry.name, start, length)
            write_durably(path, data)
            return data

    def forget(self) -> None:
        """Drop what was read from the cache."""
        self._stop()
        for folder in self._touched:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Close the connections."""
        self._stop()
        for reader in self._readers:
            reader.close()
        self._readers.clear()
        self._own = threading.local()

    def _stop(self) -> None:
        if self._fetching is not None:
            self._fetching.shutdown(cancel_futures=True)
            self._fetching = None

    def _fetch(self, name: str, start: int, length: int) -> bytes:
        mine: dict[str, RangeReader] = self._own.__dict__
        if name not in mine:
            mine[name] = RangeReader(self._urls[name])
            self._readers.append(mine[name])
        return mine[name].read(start, length)

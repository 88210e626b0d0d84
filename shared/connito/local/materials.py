"""Prepare base model and corpora of a run, in the cache and in the store."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from connito.base.corpora import Plan
from connito.base.recipes import cached_base, cached_manifest, is_whole
from connito.base.upload import HOLDOUT, PUBLIC, upload_base
from connito.data.corpus import Corpus
from connito.data.manifest import FileEntry, Manifest
from connito.data.safetensors_header import SAFETENSORS
from connito.errors import Fatal
from connito.local.defaults import Profile, UpOptions
from connito.local.display import Display
from connito.local.installation import Installation
from connito.local.processes import Program
from connito.local.tasks import read_lines
from connito.platform.spawning import last_lines
from connito.protocol.entitlement import base_proof
from connito.store.cache import Cache
from connito.v1.run_pb2 import BaseRef, CorpusRef, RunSpec
from connito.wire import sealing


@dataclass(frozen=True)
class Materials:
    """A base with its manifest, and the folder with the corpora."""

    name: str
    folder: Path
    manifest: Manifest
    corpora: Path

    def corpus(self, domain: str, part: str) -> Path:
        """Return the file of one corpus."""
        return self.corpora / f"{domain}.{part}.safetensors"


async def run_task(
    installation: Installation, name: str, params: Mapping[str, Any], progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Run one of `connito.local.tasks` in a fork of the preloaded process. Raises what the task raised, and `Fatal`
    with the end of its log when it died."""
    program = Program(
        name=f"task {name}",
        module="connito.local.tasks",
        env=installation.task_environment(),
        log=installation.data.logs / "tasks.log",
        cwd=installation.data.root,
        arguments=(name, json.dumps(params)),
    )
    while True:
        losses = installation.fork_server.losses
        result, code = await _run(installation, program, progress)
        if result is not None:
            return result
        if losses == installation.fork_server.losses:
            raise Fatal(f"the task {name} ended with code {code}; its log ends with:\n{last_lines(program.log)}")


async def _run(
    installation: Installation, program: Program, progress: Callable[[str, float], None]
) -> tuple[dict[str, Any] | None, int]:
    read_end, write_end = os.pipe()
    try:
        process = await installation.fork_server.start(program, stdout=write_end)
    finally:
        os.close(write_end)
    try:
        async for line in _lines(read_end):
            result = read_lines(iter([line]), progress)
            if result is not None:
                return result, await process.exited
        return None, await process.exited
    finally:
        await process.stop(2.0)


async def _lines(descriptor: int) -> AsyncIterator[str]:
    """Yield the lines of a pipe until its other end closes."""
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    with os.fdopen(descriptor, "rb") as pipe:
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            while line := await reader.readline():
                yield line.decode()
        finally:
            transport.close()


async def prepare(installation: Installation, options: UpOptions, profile: Profile, display: Display) -> Materials:
    """Build, or find, the base and the corpora."""
    folder, manifest = await _base(installation, options, display)
    plan = Plan.of(folder, manifest.digest, tiny=profile.small, target=options.target)
    if not plan.folder.is_dir():
        await run_task(installation, "corpora", plan.to_json(), display.progress)
    return Materials(manifest.name, folder, manifest, plan.folder)


async def _base(installation: Installation, options: UpOptions, display: Display) -> tuple[Path, Manifest]:
    if options.base in ("demo", "tiny"):
        target = cached_base(options.base)
        if not await asyncio.to_thread(is_whole, options.base):
            again = "; the one that is there is damaged" if target.is_dir() else ""
            display.say(f"building the {options.base} base, once for this machine, into {target}{again}")
            await run_task(installation, "build_base", {"name": options.base}, display.progress)
        return target / "model", cached_manifest(options.base)
    folder, out = Path(options.base).absolute(), installation.data.root / "base-manifest.json"
    params = {"folder": str(folder), "out": str(out)}
    await run_task(installation, "manifest", params, display.progress)
    return folder, replace(Manifest.load(out), name=folder.name)


async def upload(
    installation: Installation, materials: Materials, profile: Profile, run: str, display: Display
) -> RunSpec:
    """Put everything into the store and the local caches, and fill the references into the profile's RunSpec."""
    store, spec = installation.store, RunSpec()
    spec.CopyFrom(profile.spec)
    spec.run = run
    # Services map the weights from the cache: one copy on disk and in memory for all of them.
    for cache in (store.cache, Cache(installation.miner_cache)):
        await asyncio.to_thread(_link_base, cache, materials, materials.manifest.files.values())
    manifest = await upload_base(store, materials.folder, materials.manifest, display.progress)
    customer = installation.members["customer"].identity
    proof = base_proof(customer.public, materials.manifest.to_bytes())
    spec.base.CopyFrom(BaseRef(name=materials.name, manifest=manifest, proof=proof))

    async def corpus(domain: str, part: str) -> CorpusRef:
        ref = await store.put_file(materials.corpus(domain, part), SAFETENSORS, PUBLIC, cache=True)
        tokens = len(Corpus.load(materials.corpus(domain, part), mmap=True).tokens)
        return CorpusRef(domain=domain, artifact=ref, tokens=tokens)

    async def held(domain: str) -> CorpusRef:
        judges = sealing.judges(installation.roster, customer.public)
        with tempfile.TemporaryDirectory() as folder:
            sealed = Path(folder) / "sealed"
            await asyncio.to_thread(sealing.seal_file, materials.corpus(domain, "holdout"), sealed, customer, judges)
            return CorpusRef(
                domain=domain, artifact=await store.put_file(sealed, sealing.MEDIA_TYPE, HOLDOUT, cache=True)
            )

    spec.probe.CopyFrom(await corpus(spec.domain, "probe"))
    spec.train.CopyFrom(await corpus(spec.domain, "train"))
    spec.holdout.CopyFrom(await held(spec.domain))
    for path in sorted(materials.corpora.glob("*.json")):
        if path.stem != spec.domain:
            spec.general_holdouts.append(await held(path.stem))
    return spec


def _link_base(cache: Cache, materials: Materials, entries: Iterable[FileEntry]) -> None:
    for entry in entries:
        source = materials.folder / entry.name
        cache.get(entry.ref, partial(_link, source))


def _link(source: Path, target: Path) -> None:
    """Make a hard link to a read-only file where the file system allows it, else copy."""
    with suppress(OSError):
        if source.stat().st_mode & 0o222 == 0:
            os.link(source, target)
            return
    shutil.copyfile(source, target)

"""Start the server: a base into memory, its experts within reach, and an address."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import yaml

from connito.base.description import build_manifest
from connito.base.loading import load_full, load_tokenizer
from connito.base.recipes import called
from connito.curation.holdings import Agreement, Holdings
from connito.curation.serving.generation import Generator
from connito.curation.serving.http import application
from connito.curation.serving.roster import Roster
from connito.curation.serving.server import Server
from connito.data.documents import parse_json
from connito.errors import Invalid, NotFound
from connito.experts.table import ExpertTable
from connito.library.governance import Viewer
from connito.moe.device import device_of
from connito.render import formats
from connito.runtime.logs import keep_log
from connito.runtime.tasks import end_tasks

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEY_LENGTH = 16


@dataclass(frozen=True)
class ServeOptions:
    """The base to serve, its users, and the share of the machine that it may take.

    keys: YAML file of `key`, `name` and `organisations`, one entry a user; without it everybody is the viewer of the holdings.
    experts: models beside the base that may be resident at once; cache_tokens: of all requests together; batch_tokens: computed
    in one step; requests: computed at once; waiting: accepted at once; seconds: between looks at what may still be used.
    """

    base: Path
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    experts: int = 32
    cache_tokens: int = 16384
    batch_tokens: int = 512
    requests: int = 32
    waiting: int = 256
    seconds: float = 10.0
    agreement: Agreement = field(default_factory=Agreement)


def serve(
    options: ServeOptions, library: Holdings | None = None, began: Callable[[str], None] = lambda _: None
) -> None:
    """Serve until the process is told to stop; `began` is told the address. Raises `Invalid` for what cannot be served."""
    library = library or Holdings()
    keys = read_keys(options.keys) if options.keys is not None else {}
    if not keys and options.host not in LOOPBACK:
        raise Invalid(
            f"whoever reaches {options.host} could use every expert: name users with --keys FILE, or listen on 127.0.0.1"
        )
    listener = _listen(options.host, options.port)
    # What it says of itself is for whoever runs it, whatever commands of this process would rather keep quiet.
    keep_log("serve")
    try:
        server = prepare(options, library)
        port = listener.getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        began(f"http://{host}:{port}/v1")
        asyncio.run(run(server, application(server, library.viewer, keys), listener))
    finally:
        listener.close()


def prepare(options: ServeOptions, library: Holdings) -> Server:
    """Load the base and make the server of it; nothing computes yet."""
    manifest = build_manifest(options.base)
    model, tokenizer = load_full(options.base, device=device_of()), load_tokenizer(options.base)
    table = ExpertTable(model)
    generator = Generator(
        table, ends=_ends(options.base, model, tokenizer), cache_tokens=options.cache_tokens,
        batch_tokens=options.batch_tokens, requests=options.requests,
    )  # fmt: skip
    name = options.name or called(options.base)
    roster = Roster(name, manifest, table, library, options.agreement, places=options.experts)
    return Server(generator, roster, tokenizer, waiting=options.waiting, seconds=options.seconds)


class _Uvicorn(uvicorn.Server):
    """Uvicorn that ends as it is told; its own gives itself the signal again, before what was used is written down."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
        yield


async def run(server: Server, application: Any, listener: socket.socket) -> None:
    """Compute and answer until told to stop; what was used is written down at the end."""
    server.generator.start()
    watching = asyncio.create_task(server.keep_watch())
    config = uvicorn.Config(
        application, log_config=None, access_log=False, lifespan="off", server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=5, ws="none",
    )  # fmt: skip
    try:
        await _Uvicorn(config).serve([listener])
    finally:
        await end_tasks((watching,))
        await asyncio.to_thread(server.generator.stop)
        await asyncio.to_thread(server.roster.write_uses)


def read_keys(path: Path) -> dict[str, Viewer]:
    """Read who may ask, by key. Raises `NotFound` and `Invalid`."""
    if not path.is_file():
        raise NotFound(f"there is no file {path} of API keys")
    try:
        entries = yaml.safe_load(path.read_text())
        keys = {
            str(entry["key"]): Viewer(str(entry.get("name", "")), frozenset(map(str, entry.get("organisations", []))))
            for entry in entries
        }
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise Invalid(f"{path} is not a list of users: write `- {{key: …, name: …, organisations: […]}}`") from error
    if short := [key for key in keys if len(key) < KEY_LENGTH]:
        raise Invalid(
            f"{formats.count(len(short), 'key')} in {path} can be guessed: use at least {KEY_LENGTH} random characters"
        )
    if not keys:
        raise Invalid(f"{path} names nobody")
    return keys


def _ends(base: Path, model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: what the base's generation config says, its config, its tokenizer."""
    said = base / "generation_config.json"
    given = parse_json(said.read_bytes()).get("eos_token_id") if said.is_file() else None
    found = [given, model.config.eos_token_id, tokenizer.eos_token_id]
    first: int | list[int] = next((value for value in found if value is not None), [])
    return {first} if isinstance(first, int) else set(first)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise Invalid(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port, or 0") from error

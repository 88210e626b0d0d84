"""Copies of streams, byte for byte as the broker stores them, and streams made again from such copies.

Copies of several streams are taken one after the other while others write, so they end at different moments. The cut says where
all of them ended at one moment; what a copy has behind it is removed when it is brought back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from connito.bus.client import Bus
from connito.bus.streams import FACT_STREAMS, STREAMS
from connito.errors import Invalid, Retry
from connito.files import replacing

CHUNK_BYTES = 1 << 17
WINDOW_BYTES = 1 << 20
ANSWER_SECONDS = 30.0
# So long it is tried to see all streams at one moment.
STILL_SECONDS, LOOK_AGAIN = 30.0, 0.02


@dataclass(frozen=True)
class Copied:
    """A stream as it was copied: its declaration and state, as the broker's API writes them."""

    config: dict[str, Any]
    state: dict[str, Any]


async def consistent_cut(bus: Bus) -> dict[str, int]:
    """Return by stream the sequence at which it ends, all at one moment: no fact up to there follows from one behind it.

    Sequences only grow, so what two looks in a row see alike was so between them. What miners ask for is looked at afterwards:
    facts follow from it, and more of it than they know of does no harm. Raises `Retry` where the log is never still for
    as long as two looks take.
    """
    give_up = asyncio.get_running_loop().time() + STILL_SECONDS
    seen: list[int] = []
    while (ends := list(await asyncio.gather(*map(bus.last_sequence, FACT_STREAMS)))) != seen:
        if asyncio.get_running_loop().time() > give_up:
            raise Retry(
                f"facts are written all the time: in {STILL_SECONDS:.0f} s no two looks at the streams saw the same; stop the "
                "coordinator until the backup has begun, what runs waits for it"
            )
        seen = ends
        await asyncio.sleep(LOOK_AGAIN)
    others = [name for name in STREAMS if name not in FACT_STREAMS]
    return dict(
        zip((*FACT_STREAMS, *others), (*ends, *await asyncio.gather(*map(bus.last_sequence, others))), strict=True)
    )


async def save(bus: Bus, name: str, path: Path) -> Copied:
    """Write a copy of a stream to `path`, without its consumers. Raises `Retry` when the broker stops half-way."""
    nc, chunks = bus.connection.nc, asyncio.Queue[Any]()
    async with _explained(bus, f"a copy of {name}"):
        inbox = nc.new_inbox()
        subscription = await nc.subscribe(inbox, cb=chunks.put)
        try:
            asked = {"deliver_subject": inbox, "no_consumers": True, "chunk_size": CHUNK_BYTES, "jsck": True}
            # Under what a server keeps for a client that is slow; one before 2.14 knows no such limit, and has 8 MiB.
            asked["window_size"] = WINDOW_BYTES
            head = await _ask(bus, f"$JS.API.STREAM.SNAPSHOT.{name}", json.dumps(asked).encode())
            with replacing(path) as draft, draft.open("wb") as file:
                while (chunk := await asyncio.wait_for(chunks.get(), ANSWER_SECONDS)).data:
                    file.write(chunk.data)
                    # The broker sends on as what it sent is taken.
                    if chunk.reply:
                        await nc.publish(chunk.reply)
                if (chunk.headers or {}).get("Status", "204") != "204":
                    raise Retry(f"the broker ended the copy of {name}: {chunk.headers}", dependency="broker")
        finally:
            with suppress(NatsError):
                await subscription.unsubscribe()
    return Copied(head["config"], head["state"])


async def make_room(bus: Bus, names: list[str]) -> None:
    """Remove these streams, where nobody has said anything yet. Raises `Invalid`, and removes none, where somebody has."""
    async with _explained(bus, "streams"):
        there = []
        for name in names:
            with suppress(NotFoundError):
                state = (await bus.js.stream_info(name)).state
                # What the broker itself has to say of its consumers is no reason.
                if state.last_seq and STREAMS[name].append_only:
                    raise Invalid(
                        f"the broker has a stream {name} with {state.messages} messages; a backup goes into an empty broker: "
                        "stop the services and give it an empty folder or volume"
                    )
                there.append(name)
        for name in there:
            await bus.js.delete_stream(name)


async def load(bus: Bus, name: str, path: Path, copied: Copied, last: int, replicas: int = 0) -> None:
    """Make a stream from a copy, and remove what it has behind sequence `last`. `replicas`: as many as it had for 0."""
    async with _explained(bus, f"a copy of {name}"):
        # What nobody may delete later is deleted here; `streams.ensure` forbids it again.
        config = {**copied.config, "deny_delete": False, "num_replicas": replicas or copied.config["num_replicas"]}
        asked = json.dumps({"config": config, "state": copied.state}).encode()
        to = (await _ask(bus, f"$JS.API.STREAM.RESTORE.{name}", asked))["deliver_subject"]
        with path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                await _ask(bus, to, chunk)
        # No more: the broker answers when the stream is there.
        await _ask(bus, to, b"")
        stored = (await bus.js.stream_info(name)).state.last_seq
        for sequence in range(last + 1, stored + 1):
            with suppress(NotFoundError):
                await bus.js.delete_msg(name, sequence)


async def _ask(bus: Bus, subject: str, data: bytes) -> dict[str, Any]:
    reply = await bus.connection.nc.request(subject, data, timeout=ANSWER_SECONDS)
    answer: dict[str, Any] = json.loads(reply.data or b"{}")
    if error := answer.get("error"):
        raise Invalid(f"the broker refuses {subject}: {error.get('description')}")
    return answer


@asynccontextmanager
async def _explained(bus: Bus, what: str) -> AsyncIterator[None]:
    try:
        yield
    except APIError as error:
        raise Invalid(f"the broker refuses {what}: {error.description}") from error
    except (TimeoutError, NatsError) as error:
        raise bus.connection.explain(error, what) from error

"""Send an object through the store and an event about it through the bus; fail unless both come back unchanged.

Run by `helm test` with the operator's key. It leaves the platform's streams alone: the event goes through a stream in
memory that exists only for this test. The object is always the same one, so repeating the test adds nothing.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from connito.bus import Bus
from connito.runtime.settings import ServiceSettings
from connito.store import ArtifactStore
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.wire.identity import Identity
from nats.js import api

OBJECT = b"connito helm test\n"


async def main() -> None:
    """The round trip; any failure ends the pod with a traceback and a non-zero code."""
    settings = ServiceSettings.load()
    identity = Identity.load(settings.key_file)
    with tempfile.TemporaryDirectory() as cache:
        store = ArtifactStore(
            settings.s3_endpoint, settings.s3_access_key, settings.s3_secret_key.get_secret_value(),
            settings.s3_bucket, settings.s3_region, Path(cache),
        )  # fmt: skip
        ref = await store.put_bytes(OBJECT, "text/plain", REALM_PUBLIC)
        print(f"object   stored as {ref.digest} in {settings.s3_bucket}")
        async with await Bus.connect(settings, identity, "helm-test") as bus:
            received = await around(bus.js, ref)
        assert received == ref, f"the event came back changed: {received} instead of {ref}"
        print("event    stored by the broker and received unchanged")
        assert await store.get_bytes(received) == OBJECT, "the object came back changed"
        print("object   read back, digest verified")


async def around(js: object, ref: ArtifactRef) -> ArtifactRef:
    """Publish `ref` on a stream of its own and return what a consumer of that stream receives."""
    name = f"HELMTEST_{os.urandom(6).hex()}"
    subject = f"connito-helm-test.{name}"
    await js.add_stream(api.StreamConfig(name=name, subjects=[subject], storage=api.StorageType.MEMORY, max_age=300))
    try:
        await js.publish(subject, ref.SerializeToString())
        consumer = await js.pull_subscribe(subject, stream=name)
        (message,) = await consumer.fetch(1, timeout=10)
        await message.ack_sync()
        return ArtifactRef.FromString(message.data)
    finally:
        await js.delete_stream(name)


asyncio.run(main())

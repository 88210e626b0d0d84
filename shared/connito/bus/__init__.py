"""The log and the work queues: what services say to each other, over NATS JetStream.

`publish_fact` writes a fact once; `follow` reads streams from the start and stays; `consume` shares a work queue.
"""

from __future__ import annotations

from connito.bus.client import Bus
from connito.bus.follow import CaughtUp

__all__ = ["Bus", "CaughtUp"]

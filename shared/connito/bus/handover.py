"""Taking over a work queue from a process that is gone or stands still."""

from __future__ import annotations

import asyncio

from nats.errors import Error as NatsError

from connito.bus.client import Bus
from connito.bus.connection import REQUEST_TIMEOUT
from connito.bus.streams import DURABLES

# After so many the broker is waited for, so that they do not pile up here.
AT_ONCE = 1000


async def take_over(bus: Bus, durable: str) -> bool:
    """Have what somebody drew from this durable consumer and did not finish delivered anew, before what is new.

    Returns False while somebody else asks for messages there, who would get it: one that stands still, for as long as
    the broker keeps its question.
    """
    stream = DURABLES[durable].stream
    info = await bus.manage(bus.js.consumer_info(stream, durable), f"consumer {durable}")
    if info.num_waiting:
        return False
    if info.num_ack_pending and info.ack_floor and info.delivered:
        try:
            for count, sequence in enumerate(range(info.ack_floor.stream_seq + 1, info.delivered.stream_seq + 1), 1):
                # Of what is finished the broker drops it.
                place = f"$JS.ACK.{stream}.{durable}.1.{sequence}.{info.delivered.consumer_seq}.0.0"
                await bus.connection.nc.publish(place, b"-NAK")
                if count % AT_ONCE == 0:
                    await bus.connection.nc.flush(timeout=REQUEST_TIMEOUT)
                    await asyncio.sleep(0)
            await bus.connection.nc.flush(timeout=REQUEST_TIMEOUT)
        except (TimeoutError, NatsError, OSError) as error:
            raise bus.connection.explain(error, f"consumer {durable}") from error
    return True

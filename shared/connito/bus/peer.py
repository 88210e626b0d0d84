"""The client library's end of a connection, which no bytes of a stranger close.

What the library cannot take apart ends its reading: nothing more is heard until pings are missed, and a message of a work queue
comes again to end it again. Strangers choose tokens of subjects, where answers go, and headers, which the broker passes on.
"""

from __future__ import annotations

import re
from typing import Any

from nats.aio import client
from nats.protocol import parser

# The broker parts words by spaces alone, two where a reply is empty. The library takes other white space for it too, which a
# subject may hold.
parser.MSG_RE = re.compile(rb"\AMSG +([^ \r\n]+) +(\d+) +(([^ \r\n]+) +)?(\d+)\r\n")
parser.HMSG_RE = re.compile(rb"\AHMSG +([^ \r\n]+) +(\d+) +(([^ \r\n]+) +)?(\d+) +(\d+)\r\n")


class Client(client.Client):  # type: ignore[misc]
    """The library's, which takes whatever comes as text."""

    async def _process_headers(self, headers: bytes) -> Any:
        try:
            return await super()._process_headers(headers)
        except (ValueError, LookupError):
            return self._parse_header_lines(headers.partition(b"\r\n")[2]) or None

    def _build_message(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any) -> Any:
        return super()._build_message(sid, _text(subject), _text(reply), data, headers)


def _text(raw: bytes) -> bytes:
    return raw if raw.isascii() else raw.decode(errors="replace").encode()

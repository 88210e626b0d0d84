"""One key's worst, by a program that has nothing but passes: `python -m tests.support.flooding`, told by standard input."""

from __future__ import annotations

import base64
import json
import select
import socket
import sys
import time
from typing import Any

from connito.wire.identity import Identity

# What a program asks and says that means no harm is at most a few a second; a flood is as many as a line takes, or so many.
SLICE = 0.02


class Line:
    """A bare connection, which takes what it is answered and forgets it, or leaves it where it lies (`deaf`)."""

    def __init__(self, port: int, key: Identity, token: str, deaf: bool) -> None:
        self.link = socket.create_connection(("127.0.0.1", port), timeout=30)
        if deaf:
            self.link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        nonce = json.loads(self.link.recv(1 << 16).split(b"\r\n")[0].removeprefix(b"INFO "))["nonce"]
        signed = base64.urlsafe_b64encode(key.sign_nonce(nonce.encode())).rstrip(b"=").decode()
        hello = {"jwt": token, "sig": signed, "nkey": key.public, "verbose": False, "headers": True}
        self.link.sendall(
            f"CONNECT {json.dumps(hello)}\r\nSUB connito.answered.v1.{key.public}.a 1\r\nPING\r\n".encode()
        )
        self.link.setblocking(False)
        self.deaf, self.rest, self.read = deaf, b"", 0

    def say(self, data: bytes) -> bool:
        """Send as much as goes; return whether all of it went."""
        if not self.deaf:
            while select.select([self.link], [], [], 0)[0]:
                if not (got := self.link.recv(1 << 18)):
                    raise ConnectionError("closed")
                self.read += len(got)
                if b"-ERR" in got[:200]:
                    print("told", got[:120], file=sys.stderr)
        self.rest = self.rest or data
        try:
            self.rest = self.rest[self.link.send(self.rest) :]
        except BlockingIOError:
            return False
        return not self.rest


def flood(said: dict[str, Any]) -> dict[str, int]:
    """Send `data` (each a message on the wire) over `lines` connections, `rate` a second together, for so many seconds; `once`:
    until one is closed.
    """
    key, ends = Identity.from_seed(said["seed"]), time.monotonic() + said["seconds"]
    data = [base64.b64decode(one) for one in said["data"]]
    lines: list[Line] = []
    sent = opened = closed = 0
    began, at = time.monotonic(), 0
    refused_until = 0.0
    while (now := time.monotonic()) < ends and not (said.get("once") and closed):
        while len(lines) < said["lines"] and now >= refused_until:
            try:
                lines.append(Line(said["port"], key, said["token"], said.get("deaf", False)))
                opened += 1
                if said.get("anew"):
                    lines.pop().link.close()
                    sent += 1
                    break
            except (OSError, ValueError, KeyError):
                refused_until = now + 0.02
                closed += 1
                break
        due = said["rate"] * (now - began) - sent if said["rate"] else 1e9
        if due < 1:
            time.sleep(min(SLICE, (1 - due) / said["rate"]))
            continue
        moved = False
        for line in list(lines):
            count = max(1, min(100, int(due // max(1, len(lines)))))
            try:
                if line.say(b"".join(data[(at + n) % len(data)] for n in range(count))):
                    sent, at, moved = sent + count, at + count, True
            except (OSError, ConnectionError):
                closed += 1
                lines.remove(line)
        if not moved:
            time.sleep(0.001)
    return {"sent": sent, "opened": opened, "closed": closed, "read": sum(line.read for line in lines)}


if __name__ == "__main__":
    print(json.dumps(flood(json.load(sys.stdin))))

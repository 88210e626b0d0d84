"""A headless Chromium, driven through its debugging pipe (Chrome DevTools Protocol): no port, no further package.

A command is a JSON object ended by a zero byte on file descriptor 3, answers and events come the same way on 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--no-proxy-server", "--remote-debugging-pipe",
)  # fmt: skip
# Becomes the command behind its first two arguments, which are the descriptors to have as 3 and 4. A shell would do only
# below ten: what dash says to `3<&12` is "Bad fd number".
AS_3_AND_4 = (
    "import fcntl, os, sys; "
    "read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]); "
    "os.dup2(read, 3); os.dup2(write, 4); "
    "os.execvp(sys.argv[3], sys.argv[3:])"
)
KEYS = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, " ": 32}


class BrowserError(AssertionError):
    """The browser, or the page in it, says that something is wrong."""


class Chromium:
    """One browser process. `pages()` are tabs in it."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._rest = b""

    def __enter__(self) -> Chromium:
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        arguments = [*FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", AS_3_AND_4, str(read), str(write), "chromium", *arguments],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, session: str = "", /, seconds: float = 30, **params: Any) -> dict[str, Any]:
        """Ask and wait for the answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        give_up = time.monotonic() + seconds
        while (answer := self._answers.pop(self._number, None)) is None:
            self.pump(give_up - time.monotonic(), method)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def pump(self, seconds: float, what: str) -> None:
        """Take what has come from the browser; wait for it when there is nothing."""
        if seconds <= 0 or not select.select([self._read], [], [], seconds)[0]:
            raise BrowserError(f"the browser does not answer to {what}")
        data = os.read(self._read, 1 << 20)
        if not data:
            raise BrowserError(f"the browser ended during {what}")
        *whole, self._rest = (self._rest + data).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._events.append(message)

    def events(self, session: str) -> Iterator[dict[str, Any]]:
        """What a page has reported since the last time."""
        kept: list[dict[str, Any]] = []
        for event in self._events:
            if event.get("sessionId") == session:
                yield event
            else:
                kept.append(event)
        self._events = kept

    @contextmanager
    def page(self, address: str, *, dark: bool = False, width: int = 1280, height: int = 900) -> Iterator[Page]:
        """A tab that shows an address, until the block is left."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        try:
            page.open(address)
            yield page
        finally:
            self.call("Target.closeTarget", targetId=target)


@dataclass
class Page:
    """A tab. `complaints` are what the page logged as an error: exceptions, blocked resources, failed requests."""

    browser: Chromium
    session: str
    complaints: list[str] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol to this tab."""
        return self.browser.call(method, self.session, **params)

    def open(self, address: str) -> None:
        """Go to an address and wait until it is there."""
        failed = self.call("Page.navigate", url=address).get("errorText")
        if failed:
            raise BrowserError(f"{address}: {failed}")
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'", f"{address} to load")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            details = done["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return done["result"].get("value")

    def until(self, expression: str, what: str, seconds: float = 20) -> Any:
        """Wait until an expression is true of a page that is there; its value, or True for an element."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            try:
                loaded = f"document.body && document.readyState === 'complete' && ({expression})"
                if value := self.evaluate(f"((found) => found instanceof Node || found)({loaded})"):
                    return value
            except BrowserError as error:
                # The page is being exchanged for another one.
                if "context" not in str(error) and "navigated" not in str(error):
                    raise
            time.sleep(0.05)
        text = self.evaluate("document.body ? document.body.innerText.slice(0, 2000) : ''")
        raise BrowserError(f"waited {seconds} s for {what}; the page shows:\n{text}")

    def press(self, key: str) -> None:
        """A key, pressed and released."""
        code = {"key": key, "windowsVirtualKeyCode": KEYS[key], "code": key}
        typed = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def problems(self) -> list[str]:
        """Everything that the page complained about so far."""
        for event in self.browser.events(self.session):
            if event["method"] == "Runtime.exceptionThrown":
                details = event["params"]["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description") or details["text"])
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                entry = event["params"]["entry"]
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}".strip())
        return self.complaints

    def barriers(self, axe: Path) -> list[str]:
        """What axe finds, as one line each: WCAG 2.2 A and AA, and its best practices."""
        if not self.evaluate("typeof axe !== 'undefined'"):
            self.evaluate(axe.read_text() + "; true")
        tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
        options = json.dumps({"runOnly": tags, "resultTypes": ["violations"]})
        found = self.evaluate(f"axe.run(document, {options}).then((done) => done.violations)")
        return [
            f"{one['id']} ({one['impact']}): {one['help']}: {node['html'][:160]} {node.get('failureSummary', '')[:300]}"
            for one in found
            for node in one["nodes"]
        ]

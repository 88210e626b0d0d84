"""Progress display of `connito up`: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol, Self

from connito.render import formats
from connito.runtime.waiting import DISK
from connito.views.live import announce, render
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts

if TYPE_CHECKING:
    from rich.console import RenderableType


class Display(Protocol):
    """Receives the progress of a run."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def say(self, text: str) -> None:
        """Show a message."""
        ...

    def progress(self, what: str, share: float) -> None:
        """Show the progress of a long task, 0 to 1."""
        ...

    def fact(self, fact: Fact, facts: RunFacts, names: Mapping[str, str]) -> None:
        """Show a new fact of the run."""
        ...

    def hindrances(self, lines: Sequence[str]) -> None:
        """Show what cannot be done now; what was shown before and is not among it is over."""
        ...

    def tick(self) -> None:
        """Refresh what depends on the time."""
        ...


class PlainDisplay:
    """Prints one line per event, for logs and pipes."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self._began = time.monotonic()
        self._told: dict[str, int] = {}
        self._hindrances: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def say(self, text: str) -> None:
        try:
            print(f"[{time.monotonic() - self._began:6.1f} s] {text}", file=self._stream, flush=True)
        except OSError as error:
            # A line less, where its file is on a full disk; nobody reads what goes into a pipe that was closed.
            if error.errno not in DISK:
                raise

    def progress(self, what: str, share: float) -> None:
        """Print a line at the start and at every half, so that a log stays short."""
        topic, step = what.split(",", maxsplit=1)[0], int(share * 2)
        if self._told.get(topic) != step:
            self._told[topic] = step
            self.say(f"{what} ({formats.percent(share, 0)})" if share < 1 else f"{what}: done")

    def fact(self, fact: Fact, facts: RunFacts, names: Mapping[str, str]) -> None:
        line = announce(fact, facts, names)
        if line is not None:
            self.say(line)

    def hindrances(self, lines: Sequence[str]) -> None:
        for line in lines:
            if line not in self._hindrances:
                self.say(line)
        self._hindrances = set(lines)

    def tick(self) -> None:
        return


class LiveDisplay:
    """Shows a table of the run at the bottom of the terminal, and messages above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._facts: RunFacts | None = None
        self._names: Mapping[str, str] = {}
        self._work = ""
        self._hindrances: Sequence[str] = ()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work = ""
        self.tick()
        self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def progress(self, what: str, share: float) -> None:
        width = 24
        done = int(width * max(0.0, min(1.0, share)))
        self._work = "" if share >= 1 else f"{'━' * done}{'╌' * (width - done)} {formats.percent(share, 0):>5}  {what}"
        self.tick()

    def fact(self, fact: Fact, facts: RunFacts, names: Mapping[str, str]) -> None:
        self._facts, self._names = facts, names
        self.tick()

    def hindrances(self, lines: Sequence[str]) -> None:
        self._hindrances = lines

    def tick(self) -> None:
        self._live.update(self._picture(), refresh=True)

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        if self._facts is None or self._facts.spec is None:
            return Text(self._work)
        # The validators of this machine have one vote each.
        run = render(self._facts, self._names, time.time_ns() // 1_000_000, lambda validator: 1.0)
        return Group(run, *(Text(line, style="yellow") for line in self._hindrances))


def choose_display(*, as_json: bool) -> Display:
    """Return a live display on a terminal; plain lines otherwise, on stderr when stdout is for one JSON document."""
    if as_json:
        return PlainDisplay(sys.stderr)
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()

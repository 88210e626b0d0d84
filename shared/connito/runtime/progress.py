"""Tell whoever waits how far a long piece of work is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from html import escape
from typing import Any

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is, 0 to 1."""

Notify = Callable[[str], None]
"""Called with one line for whoever waits."""


_LISTENING: ContextVar[Notify] = ContextVar("listening")


def tell(what: str) -> None:
    """Say what begins now, to whoever listens: the work below them knows neither them nor how long it takes."""
    _LISTENING.get(silent)(what)


@contextmanager
def listening(notify: Notify) -> Iterator[None]:
    """Hear what `tell` says inside."""
    token = _LISTENING.set(notify)
    try:
        yield
    finally:
        _LISTENING.reset(token)


def silent(*_: object) -> None:
    """Tell nobody."""


def below_the_cell() -> Progress:
    """Return what shows one bar below the cell of a notebook, and nothing anywhere else."""
    found: Any = sys.modules.get("IPython")
    shell = None if found is None else found.get_ipython()
    return silent if getattr(shell, "kernel", None) is None else _Bar()


class _Bar:
    """A bar that is moved where it stands. Drawn by the notebook's own display: no widgets need to be installed."""

    def __init__(self) -> None:
        self._shown: Any = None

    def __call__(self, what: str, share: float) -> None:
        from IPython.display import display

        share = max(0.0, min(1.0, share))
        text = f"{share:4.0%}  {what}"
        page = f'<progress max="1" value="{share:.3f}" style="width: 24em"></progress> {escape(text)}'
        drawn = {"text/plain": text, "text/html": page}
        if self._shown is None:
            self._shown = display(drawn, raw=True, display_id=True)
        else:
            self._shown.update(drawn, raw=True)

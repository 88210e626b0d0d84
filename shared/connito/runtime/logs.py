"""Logs as JSON lines, and the trace that ties the messages of a cycle together (W3C Trace Context)."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TextIO, cast

import structlog

TRACEPARENT = "traceparent"
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_current: ContextVar[str] = ContextVar("traceparent", default="")

Logger = structlog.typing.FilteringBoundLogger
# Programs of this process that have a log of their own.
_kept: list[str] = []


def setup_logging(service: str, log_format: str = "json", log_level: str = "info") -> None:
    """Send every log line of the process to stderr: one JSON object a line, or text for people."""
    _configure(structlog.processors.JSONRenderer() if log_format == "json" else _console(), log_level)
    structlog.contextvars.bind_contextvars(service=service)
    # Libraries log through the standard module; their warnings come out in the same form.
    logging.basicConfig(handlers=[_StructlogHandler()], level=logging.WARNING, force=True)


def keep_log(service: str, file: TextIO | None = None) -> None:
    """Set up the log, on stderr or in a file, of a program that uses what commands use: from then on `quiet` does nothing."""
    on_terminal = file is None and sys.stderr.isatty()
    setup_logging(service, os.environ.get("CONNITO_LOG_FORMAT") or ("console" if on_terminal else "json"))
    if file is not None:
        structlog.configure(logger_factory=lambda *_: LineLogger(file))
    _kept.append(service)


def quiet() -> None:
    """Send what is logged nowhere: a command's own output is not the place for it."""
    if not _kept:
        setup_logging("cli", "json", "error")
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


def _configure(renderer: Any, level: str) -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Looked up when a logger is made: whoever replaced sys.stderr gets the lines.
        logger_factory=lambda *_: LineLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


class LineLogger(structlog.WriteLogger):
    """A logger whose lines are lost where they cannot be written: a full disk must not end what is told of there."""

    def msg(self, message: str) -> None:
        """Write a line."""
        with suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def _console() -> Any:
    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())


class _StructlogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        get_logger(record.name).log(record.levelno, record.getMessage())


def _add_trace(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if trace := _current.get():
        event["trace_id"] = trace.split("-")[1]
    return event


def get_logger(name: str) -> Logger:
    """Return a logger; `name` says which part of the program speaks."""
    return cast(Logger, structlog.get_logger(component=name))


def bind_run(run: str, cycle: int | None = None) -> None:
    """Put run and cycle on every line that the current task logs from here on."""
    structlog.contextvars.bind_contextvars(run=run, **({} if cycle is None else {"cycle": cycle}))


def new() -> str:
    """Return a new traceparent: a trace of its own."""
    return f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"


def extract(headers: Mapping[str, str] | None) -> str:
    """Return the sender's traceparent, or the empty string if there is none that is well formed."""
    value = (headers or {}).get(TRACEPARENT, "")
    return value if _TRACEPARENT.fullmatch(value) else ""


def current() -> str:
    """Return the traceparent of the current task, or the empty string."""
    return _current.get()


def use(traceparent: str) -> None:
    """Continue a trace in the current task: what it logs and sends belongs to that trace."""
    _current.set(traceparent)


def inject(headers: dict[str, str]) -> dict[str, str]:
    """Add the current trace, or a new one, to outgoing headers."""
    headers[TRACEPARENT] = _current.get() or new()
    return headers


# A program that uses this code as a library hears of trouble only, and its stdout stays its own.
if not structlog.is_configured():
    _configure(_console(), "warning")

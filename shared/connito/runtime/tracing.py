"""Spans for OpenTelemetry: a span for each message published, each message handled and each action done.

Off unless `OTEL_EXPORTER_OTLP_ENDPOINT` (or its form for traces) is set; nothing of OpenTelemetry is imported then, while
trace identifiers still travel with the messages and stand in the logs. On, every process exports over OTLP/HTTP, and a
consumer's span is a child of the producer's span and linked to it (OpenTelemetry semantic conventions for messaging).
The usual `OTEL_*` variables set sampling, batching and headers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from connito.errors import Fatal
from connito.runtime import logs

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext, Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

Kind = Literal["PRODUCER", "CONSUMER", "INTERNAL"]

_tracer: Tracer | None = None


def start(service: str) -> Callable[[], None]:
    """Begin to export this process's spans, if an endpoint is set. Returns what flushes and ends it.

    Raises `Fatal` when an endpoint is set and the `tracing` extra is not installed.
    """
    global _tracer
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return _nothing
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise Fatal(
            f"{ENDPOINTS[0]} is set, but OpenTelemetry is not installed: pip install 'connito[tracing]', or unset it"
        ) from error
    resource = Resource.create({"service.name": f"connito-{service}", "service.namespace": "connito"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("connito")

    def end() -> None:
        global _tracer
        _tracer = None
        provider.shutdown()

    return end


def _nothing() -> None:
    pass


@contextmanager
def span(name: str, kind: Kind, cause: str, **attributes: str | int) -> Iterator[None]:
    """Do the body as a span caused by `cause`, a traceparent or "" for a new trace.

    Within, logs and published messages belong to it; without an exporter, to `cause`. Underscores in the names of
    `attributes` stand for dots.
    """
    before = logs.current()
    logs.use(cause)
    try:
        if _tracer is None:
            yield
        else:
            with _recorded(_tracer, name, kind, cause, attributes) as traceparent:
                logs.use(traceparent)
                yield
    finally:
        logs.use(before)


@contextmanager
def _recorded(tracer: Tracer, name: str, kind: Kind, cause: str, attributes: dict[str, Any]) -> Iterator[str]:
    from opentelemetry import trace
    from opentelemetry.context import Context

    parent = _context_of(cause) if cause else None
    within = trace.set_span_in_context(trace.NonRecordingSpan(parent), Context()) if parent else Context()
    with tracer.start_as_current_span(
        name,
        within,
        trace.SpanKind[kind],
        {f"messaging.{key.replace('_', '.')}": value for key, value in attributes.items()},
        links=[trace.Link(parent)] if parent and kind == "CONSUMER" else (),
    ) as recorded:
        made = recorded.get_span_context()
        yield f"00-{made.trace_id:032x}-{made.span_id:016x}-{made.trace_flags:02x}"


def _context_of(traceparent: str) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    _, trace_id, span_id, flags = traceparent.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))

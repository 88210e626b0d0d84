"""Traces over the bus, as a collector receives them: real OTLP over HTTP from this process and from a real service."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from connito.errors import Fatal
from connito.platform.servers import NatsServer
from connito.protocol.findings import PROTOCOL_VERSION
from connito.runtime import logs, tracing
from connito.v1 import run_pb2
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.integration.conftest import BusFactory
from tests.integration.witness import ServiceProcess, Witness

pytestmark = pytest.mark.integration


@dataclass
class Collector:
    """An OTLP/HTTP receiver. `spans` are (service, span) in the order in which they came."""

    port: int = 0
    paths: set[str] = field(default_factory=set)
    spans: list[tuple[str, Span]] = field(default_factory=list)
    came: threading.Condition = field(default_factory=threading.Condition)

    def take(self, path: str, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self.came:
            self.paths.add(path)
            for resource in request.resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += [(names["service.name"], span) for span in scope.spans]
            self.came.notify_all()

    def one(self, wanted: Callable[[str, Span], bool], what: str) -> Span:
        """Wait for a span."""

        def found() -> Span | None:
            return next((span for service, span in self.spans if wanted(service, span)), None)

        with self.came:
            assert self.came.wait_for(lambda: found() is not None, 30), (
                f"no {what} among {[(service, span.name) for service, span in self.spans]}"
            )
            span = found()
        assert span is not None
        return span


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.take(self.path, body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.port = server.server_address[1]
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield collector
    server.shutdown()
    serving.join()
    server.server_close()


async def test_a_message_and_its_handling_in_another_process_are_one_trace(
    collector: Collector, own_nats: NatsServer, bus_factory: BusFactory, tmp_path: Path, identities: dict[str, Identity],
    roster: Roster, run_id: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    exporter = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    env = {
        "CONNITO_NATS_URL": own_nats.url, "CONNITO_TORCH_THREADS": "1", "CONNITO_S3_ENDPOINT": "http://127.0.0.1:9",
        "CONNITO_S3_ACCESS_KEY": "none", "CONNITO_S3_SECRET_KEY": "none", "NO_PROXY": "127.0.0.1", **exporter,
    }  # fmt: skip
    for name, value in {**exporter, "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    selector = ServiceProcess("selector", tmp_path / "selector", identities["selector"], roster, env).start()
    end = tracing.start("coordinator")
    try:
        bus = await bus_factory(identities["coordinator"], own_nats.url)
        spec = run_pb2.RunSpec(run=run_id, domain="medical", cycles=1, protocol_version=PROTOCOL_VERSION)
        with tracing.span("a customer's job", "INTERNAL", ""):
            asked = logs.current()
            assert await bus.publish_fact(run_id, "run", 0, "created", run_pb2.RunCreated(spec=spec))
        async with Witness.reading(bus, roster, run_id) as witness:
            await witness.until(lambda facts: facts.fact("run", 0, "selection_failed"))
    finally:
        end()
        drained = selector.drain()
        selector.kill()
    assert drained == 0

    trace_id, root_id = (bytes.fromhex(part) for part in asked.split("-")[1:3])
    sent = collector.one(
        lambda service, span: service == "connito-coordinator" and span.parent_span_id == root_id, "send"
    )
    assert (sent.trace_id, sent.kind) == (trace_id, Span.SPAN_KIND_PRODUCER)
    handled = collector.one(
        lambda service, span: service == "connito-selector" and span.parent_span_id == sent.span_id, "handling"
    )
    assert (handled.trace_id, handled.kind) == (trace_id, Span.SPAN_KIND_CONSUMER)
    assert [(link.trace_id, link.span_id) for link in handled.links] == [(trace_id, sent.span_id)]
    # What the handler then said, in the same trace again.
    answered = collector.one(lambda _, span: span.parent_span_id == handled.span_id, "answer")
    assert (answered.trace_id, answered.kind) == (trace_id, Span.SPAN_KIND_PRODUCER)
    attributes = {attribute.key: attribute.value.string_value for attribute in answered.attributes}
    assert attributes["messaging.system"] == "nats"
    assert run_id in attributes["messaging.destination.name"]
    assert collector.paths == {"/v1/traces"}
    # The service's own log lines carry the trace.
    assert f'"trace_id": "{trace_id.hex()}"' in selector.log.read_text()


def test_without_an_endpoint_nothing_is_imported_or_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    tracing.start("test")()
    traceparent = logs.new()
    with tracing.span("work", "INTERNAL", traceparent):
        assert logs.current() == traceparent


def test_an_endpoint_without_the_packages_is_an_error_that_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setenv(tracing.ENDPOINTS[0], "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(Fatal, match=r"connito\[tracing\]"):
        tracing.start("test")

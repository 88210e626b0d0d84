"""Traces over all services of a run: each cycle is one, and it shows every submission from its ingress to the merge."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from connito.runtime import tracing
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.sim.world import Scenario, carry_out, forget

CYCLES, MINERS = 2, 2
SUBJECT = "messaging.destination.name"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What a collector of all services receives."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("connito"))
    yield exporter
    provider.shutdown()


class Spans:
    """Spans of a run, with the ways between them."""

    def __init__(self, spans: tuple[ReadableSpan, ...]) -> None:
        self.all = spans
        self.by_id = {span.context.span_id: span for span in spans if span.context}

    def named(self, name: str, cycle: int) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name and self.cycle(span) == cycle]

    def cycle(self, span: ReadableSpan) -> int:
        """The cycle in the subject of what is published; -1 of what miners say, whose subject has none."""
        parts = str((span.attributes or {}).get(SUBJECT, "")).split(".")
        return int(parts[4]) if len(parts) > 4 and parts[3] != "ingress" else -1

    def trace(self, span: ReadableSpan) -> int:
        assert span.context is not None
        return int(span.context.trace_id)

    def back(self, span: ReadableSpan) -> list[str]:
        """The names of a span and of what caused it, step by step."""
        names = [span.name]
        while span.parent is not None:
            span = self.by_id[span.parent.span_id]
            names.append(span.name)
        return names


def test_a_cycle_is_one_trace_from_each_submission_to_the_merge(exported: InMemorySpanExporter) -> None:
    world = carry_out(5, Scenario(cycles=CYCLES, miners=MINERS))
    forget(world)
    spans = Spans(exported.get_finished_spans())
    traces = []
    for cycle in range(1, CYCLES + 1):
        (opened,) = spans.named("publish train.opened", cycle)
        trace = spans.trace(opened)
        traces.append(trace)
        accepted = spans.named("publish submit.accepted", cycle)
        assert len(accepted) == MINERS
        for span in accepted:
            # The miner reveals, the message comes to the committer over the work queue, and is accepted.
            way = spans.back(span)
            assert way[1:4] == ["process committer", "publish ingress.reveal", "act Reveal"], way
            assert way[-1] == "publish train.opened"
        said = [span for span in spans.all if span.name == "publish ingress.reveal" and spans.trace(span) == trace]
        assert len(said) == MINERS
        for name, count in (
            ("publish commit.accepted", MINERS), ("publish submit.closed", 1), ("publish validate.drawn", 1),
            ("publish validate.report", 2), ("publish merge.scored", 1), ("publish merge.version", 1),
        ):  # fmt: skip
            found = spans.named(name, cycle)
            assert [spans.trace(span) for span in found] == [trace] * count, name
            assert {spans.back(span)[-1] for span in found} == {"publish train.opened"}, name
    assert len(set(traces)) == CYCLES

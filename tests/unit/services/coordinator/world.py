"""A run that the coordinator's decisions move on."""

from __future__ import annotations

from typing import Any, Self

from connito.service.engine import Decision
from connito.v1 import cycle_pb2, run_pb2

from services.coordinator.handlers import CloseWindow, PublishFact, WriteHead
from tests.support.run import Run


class World(Run):
    """Performs what was decided, as the broker would store it."""

    def __init__(
        self,
        cycles: int = 2,
        min_miners: int = 1,
        min_validators: int = 1,
        improvement: float = 0.0,
        now: int = 1_000_000,
    ) -> None:
        super().__init__(now=now)
        self.cycles, self.improvement = cycles, improvement
        self.min_miners, self.min_validators = min_miners, min_validators

    def spec(self, **fields: Any) -> run_pb2.RunSpec:
        windows = run_pb2.WindowPolicy(
            min_miners=self.min_miners, min_validators=self.min_validators, floor_seconds=1, ceiling_seconds=100,
            assemble_seconds=50,
        )  # fmt: skip
        spec = super().spec(cycles=self.cycles, windows=windows, **fields)
        spec.holdout.domain = "medical"
        if self.improvement:
            spec.objective.improvement = self.improvement
        return spec

    def perform(self, decision: Decision) -> None:
        """Do what was decided, at most once each."""
        for action in decision.actions:
            match action.payload:
                case PublishFact(section, cycle, kind, message, id_):
                    self.publish(section, cycle, kind, message, id_)
                case WriteHead(number):
                    cuts = [run_pb2.StreamCut(stream=one, last_sequence=last) for one, last in self.sequences.items()]
                    self.publish("run", number, "head", run_pb2.LogHead(run=self.name, cycle=number, cuts=cuts))
                case CloseWindow(window, cycle, stream, cause):
                    message = cycle_pb2.WindowClosed(
                        run=self.name,
                        cycle=cycle,
                        window=cycle_pb2.Window.Value(f"WINDOW_{window.upper()}"),
                        stream=stream,
                        last_sequence=self.sequences.get(stream, 0),
                        cause=cause,
                    )
                    self.publish(window, cycle, "closed", message)

    def merged(self, cycle: int = 1, **fields: Any) -> Self:
        loss = cycle_pb2.DomainLoss(domain="medical", before=3.0, after=2.4, tokens=64)
        return super().merged(cycle, gate_losses=[loss], merged=self.facts.miners, **fields)

"""`python -m services.validator`: measure submissions and sign the reports."""

from __future__ import annotations

from collections.abc import Callable

from connito.errors import Fatal
from connito.runtime.compute import ComputeBudget
from connito.service.engine import Decision, Engine
from connito.service.lifecycle import Lifecycle
from connito.service.runner import ServiceContext, run_service
from connito.v1.cycle_pb2 import ScoreReport
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.heads import LogTrees
from connito.wire.log import Log
from connito.workloads.scoring import SubmissionEvaluator

from .actions import Validator
from .handlers import STREAMS, decide
from .memory import Memory
from .settings import ValidatorSettings


async def main(
    context: ServiceContext[ValidatorSettings], load: Callable[..., SubmissionEvaluator] = SubmissionEvaluator.load
) -> None:
    """Validate until told to stop. Raises `Fatal` for a key that the operator's roster does not list."""
    settings, trees = context.settings, LogTrees()
    log = Log(context.roster, trees)
    if not context.roster.permits("validator", context.identity.public):
        raise Fatal(
            f"{context.identity.public} is not a validator in the operator's roster; ask the operator to add the key"
        )
    validator = Validator(
        context.bus,
        context.store,
        ComputeBudget(settings.compute_dir, settings.compute_slots),
        settings,
        lambda run: log.runs[run],
        trees,
        Memory(
            settings.state_dir and settings.state_dir / f"signed-{context.identity.public[:16]}", context.bus.host.disk
        ),
        load,
    )

    def decide_now(facts: RunFacts, _now_ms: int) -> Decision:
        return decide(facts, validator.me, validator.secret, validator.loaded, context.roster.stake)

    engine = Engine(
        context.bus, log, STREAMS, decide_now, validator.perform,
        run=settings.run, on_fact=drop_others_scores, service="validator", kept=context.kept(STREAMS),
    )  # fmt: skip
    async with Lifecycle(context.stop) as life:
        life.start(engine.run())
        if await life.finishes(engine.caught_up.wait()):
            context.ready()
        await life.over()


def drop_others_scores(fact: Fact) -> None:
    """Drop the losses in other validators' reports: only the reporters matter here, and the losses would fill the memory."""
    if isinstance(fact.message, ScoreReport):
        fact.message.ClearField("scores")


if __name__ == "__main__":
    run_service("validator", main, ValidatorSettings)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from connito.library.deposit_plan import Deposit, NoDeposit, plan
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.facts import RunFacts
from connito.wire.subjects import FactKey


def test_the_final_state_of_a_completed_run_is_deposited(finished: RunFacts) -> None:
    decision = plan(finished)

    assert isinstance(decision, Deposit)
    assert decision.state.digest == "1" * 64
    assert decision.header.layers == {2: [1, 5], 3: [0]}
    assert (decision.header.version, decision.header.base_digest) == (2, "b" * 64)


def test_the_order_of_facts_makes_no_difference(pairs: list[tuple[Any, ...]], rebuild: Callable[..., Any]) -> None:
    assert plan(rebuild(pairs)) == plan(rebuild(pairs[::-1]))


def test_a_failed_run_leaves_nothing(pairs: list[tuple[Any, ...]], rebuild: Callable[..., Any]) -> None:
    ended = run_pb2.RunEnded(run="run-1", outcome=run_pb2.RUN_OUTCOME_FAILED)
    changed = [(key, ended if key.kind == "ended" else message) for key, message in pairs]

    assert plan(rebuild(changed)) == NoDeposit("the run did not complete")


def test_a_run_that_merged_nothing_leaves_nothing(pairs: list[tuple[Any, ...]], rebuild: Callable[..., Any]) -> None:
    for _, message in pairs:
        if isinstance(message, cycle_pb2.VersionPublished):
            message.gate = cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE

    decision = plan(rebuild(pairs))

    assert isinstance(decision, NoDeposit)
    assert "no submission was merged" in decision.why


def test_an_expert_is_deposited_once(pairs: list[tuple[Any, ...]], rebuild: Callable[..., Any]) -> None:
    deposited = run_pb2.ExpertDeposited(run="run-1", expert_id="medical-1")
    decision = plan(rebuild([*pairs, (FactKey("library", 0, "deposited", "medical-1"), deposited)]))

    assert decision == NoDeposit("the expert is already deposited")

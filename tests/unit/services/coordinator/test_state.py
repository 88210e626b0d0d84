"""The gauges of open windows follow the facts; what is read at all, and how far."""

from __future__ import annotations

from connito.protocol.quorum import present
from connito.runtime import metrics
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.envelope import seal
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.subjects import FactKey, ingress
from google.protobuf.message import Message
from prometheus_client import REGISTRY

from services.coordinator.expected import waiting
from services.coordinator.state import OpenWindows, State
from tests.support.run import RUN, even
from tests.unit.services.coordinator.world import World


def _add(facts: RunFacts, section: str, kind: str, message: Message, at_ms: int, cycle: int = 1) -> None:
    sequence = len(facts.facts) + 1
    assert facts.add(Fact(facts.run, FactKey(section, cycle, kind), message, "signer", "", sequence, at_ms))


def _gauges(window: str) -> tuple[float, float]:
    return metrics.WINDOW_OPENED.labels(window)._value.get(), metrics.WINDOW_DEADLINE.labels(window)._value.get()


def test_the_oldest_open_window_of_all_runs_counts() -> None:
    windows, old, new = OpenWindows(), RunFacts("old"), RunFacts("new")
    _add(new, "train", "opened", cycle_pb2.WindowOpened(run="new", cycle=1, deadline_unix_ms=90_000), 50_000)
    windows.notice(new)
    assert _gauges("train") == (50.0, 90.0)
    _add(old, "train", "opened", cycle_pb2.WindowOpened(run="old", cycle=1, deadline_unix_ms=70_000), 30_000)
    windows.notice(old)
    assert _gauges("train") == (30.0, 70.0)
    _add(old, "train", "closed", cycle_pb2.WindowClosed(run="old", cycle=1), 60_000)
    windows.notice(old)
    assert _gauges("train") == (50.0, 90.0)


def test_no_window_is_open_after_the_end_and_a_merge_has_no_deadline() -> None:
    windows, facts = OpenWindows(), RunFacts("one")
    _add(facts, "train", "opened", cycle_pb2.WindowOpened(run="one", cycle=1, deadline_unix_ms=9_000), 1_000)
    _add(facts, "train", "closed", cycle_pb2.WindowClosed(run="one", cycle=1), 9_000)
    _add(facts, "merge", "opened", cycle_pb2.WindowOpened(run="one", cycle=1), 10_000)
    windows.notice(facts)
    assert _gauges("train") == (0.0, 0.0)
    assert _gauges("merge") == (10.0, 0.0)
    _add(facts, "run", "ended", run_pb2.RunEnded(run="one"), 11_000, cycle=0)
    windows.notice(facts)
    assert _gauges("merge") == (0.0, 0.0)


def test_cycles_count_as_unaudited_until_a_validator_signs_a_head_behind_them(roster: Roster) -> None:
    state, facts = State(roster), RunFacts("heads")
    state.runs["heads"] = facts

    def tell(kind: str, number: int, message: Message, id_: str = "") -> float | None:
        key = FactKey("run", number, kind, id_)
        fact = Fact("heads", key, message, "signer", "RUNS", len(facts.facts) + 1, 1000)
        assert facts.add(fact)
        state.notice(fact, live=True)
        return REGISTRY.get_sample_value("connito_unaudited_cycles", {"run": "heads"})

    head, cosigned = run_pb2.LogHead(run="heads"), run_pb2.HeadCosigned(run="heads")
    assert [tell("head", 1, head), tell("head", 2, head), tell("head", 3, head)] == [1, 2, 3]
    assert tell("cosigned", 2, cosigned, "UA") == 1
    assert tell("ended", 0, run_pb2.RunEnded(run="heads")) == 1, "over, and its last cycle is nobody's"
    assert tell("cosigned", 3, cosigned, "UA") is None


def test_versions_that_the_gate_refused_in_a_row_are_counted_by_run(roster: Roster) -> None:
    state, facts = State(roster), RunFacts("gated")
    state.runs["gated"] = facts

    def tell(cycle: int, gate: cycle_pb2.GateDecision.ValueType) -> float | None:
        _add(facts, "train", "opened", cycle_pb2.WindowOpened(run="gated", cycle=cycle), 1_000, cycle=cycle)
        published = cycle_pb2.VersionPublished(run="gated", cycle=cycle, version=cycle, gate=gate)
        _add(facts, "merge", "version", published, 1_000, cycle=cycle)
        state.notice(facts.facts[FactKey("merge", cycle, "version")], live=True)
        return REGISTRY.get_sample_value("connito_kept_incumbent_cycles", {"run": "gated"})

    kept, nothing = cycle_pb2.GATE_DECISION_KEPT_INCUMBENT, cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE
    gates = [kept, cycle_pb2.GATE_DECISION_ACCEPTED, kept, nothing, kept, kept]
    assert [tell(cycle, gate) for cycle, gate in enumerate(gates, 1)] == [1, 0, 1, 1, 2, 3]
    assert tell(7, cycle_pb2.GATE_DECISION_WITH_GAINLESS) == 0
    _add(facts, "run", "ended", run_pb2.RunEnded(run="gated"), 11_000, cycle=0)
    state.notice(facts.facts[FactKey("run", 0, "ended")], live=True)
    assert REGISTRY.get_sample_value("connito_kept_incumbent_cycles", {"run": "gated"}) is None


def test_a_run_without_heads_has_nothing_to_be_signed(roster: Roster) -> None:
    state, facts = State(roster), RunFacts("headless")
    state.runs["headless"] = facts
    for cycle in (1, 2, 3):
        _add(facts, "train", "opened", cycle_pb2.WindowOpened(run="headless", cycle=cycle), 1_000, cycle=cycle)
    _add(facts, "run", "ended", run_pb2.RunEnded(run="headless"), 11_000, cycle=0)
    state.notice(facts.facts[FactKey("run", 0, "ended")], live=True)
    assert REGISTRY.get_sample_value("connito_unaudited_cycles", {"run": "headless"}) is None


def test_a_paused_run_is_not_overdue_and_says_that_it_waits(roster: Roster) -> None:
    world = World(min_miners=2)
    world.created().selected().miners("ma").validators("va").opened("train", deadline_unix_ms=1_005_000)
    state = State(roster)
    state.runs[RUN] = world.facts
    state._windows.notice(world.facts)

    def shown(name: str) -> float | None:
        labels = {"run": RUN} if name == "run_paused" else {"window": "train"}
        return REGISTRY.get_sample_value(f"connito_{name}", labels)

    assert shown("window_deadline_timestamp_seconds") == 1005
    for _ in range(2):
        state.paused(RUN, present(world.facts, 1, even))
        assert (shown("run_paused"), shown("window_deadline_timestamp_seconds")) == (1, 0)
    for _ in range(2):
        state.paused(RUN, None)
        assert (shown("run_paused"), shown("window_deadline_timestamp_seconds")) == (None, 1005)


def test_what_miners_commit_to_is_not_even_opened_here_and_counts_as_read(roster: Roster) -> None:
    state, miner = State(roster), Identity.generate(b"m" * 32)

    def heard(sequence: int, kind: str, data: bytes) -> Fact | None:
        return state.apply(Record("INGRESS", sequence, ingress(RUN, miner.public, kind), data, 1))

    assert heard(1, "commitment", b"no envelope") is None
    assert heard(2, "reveal", b"no envelope") is None
    assert state.position("INGRESS") == 2
    subject, said = ingress(RUN, miner.public, "trained"), cycle_pb2.TrainingFinished(run=RUN, cycle=1)
    assert heard(3, "trained", seal(miner, subject, said).SerializeToString()) is not None
    assert list(state.runs[RUN].trained(1)) == [miner.public]


class _Counting(RunFacts):
    """Facts that count how often one of them is asked for."""

    asked = 0

    def has(self, section: str, cycle: int, kind: str, id_: str = "") -> bool:
        self.asked += 1
        return super().has(section, cycle, kind, id_)


def test_a_window_is_waited_for_without_a_look_behind_the_first_who_owes_something() -> None:
    everybody = [f"m{number:04}" for number in range(1000)]
    world = World().created().selected().miners(*everybody).validators("v").opened("train", expected=everybody)
    world.seed_committed("v").closed("train").opened("commit", expected=everybody)
    facts = _Counting(world.name)
    for fact in world.facts.facts.values():
        facts.add(fact)
    for window in ("train", "commit"):
        facts.asked = 0
        assert waiting(facts, facts.window(window, 1))
        assert facts.asked < 10

"""How a run is shown."""

from __future__ import annotations

from connito.protocol import rules
from connito.v1 import cycle_pb2, run_pb2, services_pb2
from connito.views.live import phase
from connito.views.run_report import outcome
from connito.views.status import status, version

from services.console import views
from services.coordinator.handlers import decide
from tests.support.run import RUN, Run, even
from tests.unit.services.coordinator.world import World


def assembled() -> World:
    world = World()
    world.created()
    return world


def test_phases_up_to_the_first_cycle() -> None:
    world = assembled()
    shown = status(world.facts, world.now, even)
    assert (shown.phase, shown.cycle, shown.window) == (services_pb2.RUN_PHASE_SELECTING, 0, "")
    assert shown.spec == world.spec()
    world.selected()
    world.miners("ma")
    shown = status(world.facts, world.now, even)
    assert shown.phase == services_pb2.RUN_PHASE_ASSEMBLING
    assert shown.detail == "1 of 1 miner and 0 of 1 validator here"
    world.validators("va")
    for _ in ("head", "opened"):
        world.perform(decide(world.facts, world.now, even))
    shown = status(world.facts, world.now, even)
    assert (shown.phase, shown.cycle, shown.window) == (services_pb2.RUN_PHASE_RUNNING, 1, "train")
    assert shown.deadline_unix_ms == world.now + 100_000
    assert (list(shown.miners), list(shown.validators), shown.version) == (["ma"], ["va"], 0)


def test_between_windows_there_is_none() -> None:
    world = assembled()
    for kind, message in (("opened", cycle_pb2.WindowOpened()), ("closed", cycle_pb2.WindowClosed())):
        world.publish("train", 1, kind, message)
    assert world.facts.open_window is None
    world.publish("commit", 1, "opened", cycle_pb2.WindowOpened())
    window = world.facts.open_window
    assert window is not None
    assert window.name == "commit"


def test_the_version_is_the_last_one_published() -> None:
    world = assembled()
    world.selected()
    world.publish("train", 1, "opened", cycle_pb2.WindowOpened())
    assert version(world.facts) == 0
    world.merged(1)
    assert version(world.facts) == 1
    world.publish("train", 2, "opened", cycle_pb2.WindowOpened())
    assert version(world.facts) == 1


def test_an_ended_run_shows_its_outcome_and_no_window() -> None:
    world = assembled()
    world.selected()
    world.publish("train", 1, "opened", cycle_pb2.WindowOpened(deadline_unix_ms=5))
    ended = run_pb2.RunEnded(run=RUN, outcome=run_pb2.RUN_OUTCOME_FAILED, detail="why")
    world.publish("run", 0, "ended", ended)
    shown = status(world.facts, world.now, even)
    assert (shown.phase, shown.window, shown.deadline_unix_ms) == (services_pb2.RUN_PHASE_FAILED, "", 0)
    assert shown.detail == "why"


def test_a_run_is_paused_from_the_deadline_until_enough_are_there() -> None:
    world = World(min_miners=2)
    world.created()
    world.selected()
    world.miners("ma", "mb")
    world.validators("va")
    for _ in ("head", "opened"):
        world.perform(decide(world.facts, world.now, even))
    world.now += 100_000 - 1
    assert status(world.facts, world.now, even).phase == services_pb2.RUN_PHASE_RUNNING
    world.now += 1
    world.trained("ma")
    shown = status(world.facts, world.now, even)
    assert shown.phase == services_pb2.RUN_PHASE_PAUSED
    assert shown.detail == "cycle 1 of 2 is paused: 1 of 2 miners and 0 of 1 validator here"
    world.trained("mb")
    world.seed_committed("va")
    assert status(world.facts, world.now, even).phase == services_pb2.RUN_PHASE_RUNNING


def test_the_newest_version_says_what_it_changed_and_whose_work_is_in_it() -> None:
    run, loss = (
        Run().created().selected().opened("train"),
        cycle_pb2.DomainLoss(domain="medical", before=2.5, after=2.25),
    )
    assert not status(run.facts, 0, even).losses
    run.merged(losses=[loss], merged=["UA", "UB"]).opened("train", 2)
    shown = status(run.facts, 0, even)
    assert (list(shown.losses), list(shown.merged)) == ([loss], ["UA", "UB"])


def test_a_run_that_a_service_has_left_says_so_until_it_goes_on() -> None:
    run = Run().created().selected().miners("UA").validators("UV").opened("train")
    run.say("run", 0, "paused", key="UC", service="committer", in_cycle=1, action="r1/settle", detail="KeyError: 'x'")
    for said in (status(run.facts, 0, even).detail, phase(run.facts), outcome(run.facts)["detail"]):
        assert said == "the committer cannot go on (r1/settle): KeyError: 'x'"
    run.opened("train", 2)
    assert "committer" not in status(run.facts, 0, even).detail


def test_a_run_whose_expert_the_library_put_aside_says_so_until_it_is_deposited() -> None:
    run = Run().created().selected().ended()
    run.say("run", 0, "paused", key="UL", service="library", action="deposit", detail="upgrade it")
    run.say("run", 0, "paused", key="UC", service="committer", action="r1/settle", detail="nothing is left to do")
    why = "the library cannot go on (deposit): upgrade it"
    assert status(run.facts, 0, even).detail.endswith(why)
    assert phase(run.facts) == f"run completed; {why}"
    run.say("library", 0, "deposited", expert_id="r1-v1")
    assert phase(run.facts) == "run completed"


def test_the_deadline_is_the_one_that_a_late_first_message_left() -> None:
    run = Run().created().selected().miners("UA", "UB").validators("UV").opened("train").closed("train")
    announced = run.now + 100_000
    run.opened("commit", deadline_unix_ms=announced)
    window = run.facts.open_window
    assert window is not None
    assert status(run.facts, run.now, even).deadline_unix_ms == announced
    assert "closes at the latest in 1 min 40 s" in phase(run.facts, run.now)
    run.now += 80_000
    run.committed("UA")
    assert rules.deadline_ms(run.facts, window) == run.now + 50_000
    assert status(run.facts, run.now, even).deadline_unix_ms == run.now + 50_000
    assert views.head(run.facts, run.now, even).deadline_unix_ms == run.now + 50_000
    assert "closes at the latest in 50 s" in phase(run.facts, run.now)

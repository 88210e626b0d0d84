"""What the validator decides."""

from __future__ import annotations

import itertools
from collections.abc import Container

import pytest
from connito.v1 import cycle_pb2 as c
from connito.v1.cycle_pb2 import SeedDrawn
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from hypothesis import given, settings
from hypothesis import strategies as st

from services.validator import actions
from services.validator.handlers import CommitSeed, Doubt, Join, Object, Preload, RevealSeed, Score, Unload, decide
from tests.support.run import ME, OTHER, RUN, Run, even, secret_of


def my_secret(facts: RunFacts, cycle: int) -> bytes:
    return secret_of(ME, cycle)


def steps(story: Run, loaded: Container[str] = (RUN,)) -> list[object]:
    return [action.payload for action in decide(story.facts, ME, my_secret, loaded, even).actions]


def in_run() -> Run:
    """Selected, with the first head cosigned."""
    return Run().created().validators(ME, OTHER).selected().headed().say("run", 1, "cosigned", validator=ME)


def trained(**mine: bytes) -> Run:
    """Up to the end of training, with two validators that committed to a secret."""
    return in_run().opened("train").seed_committed(**mine).seed_committed(OTHER).closed("train")  # type: ignore[arg-type]


def scoring() -> Run:
    """Up to the draw, with two validators that revealed."""
    story = trained().closed("commit").closed("submit")
    story.opened("validate").settled("submit", submissions=[]).seed_revealed().seed_revealed(OTHER)
    return story.drawn(ME, OTHER)


def settled(**mine: bytes) -> Run:
    """Up to the end of submitting."""
    return trained(**mine).settled("submit", submissions=[])


def test_joins_every_run_once() -> None:
    assert steps(Run()) == []
    assert steps(Run().created()) == [Join()]
    assert steps(Run().created().validators(ME)) == []


def test_loads_the_model_as_soon_as_the_selection_is_known_and_lets_go_of_it_at_the_end() -> None:
    assert steps(Run().created().validators(ME), ()) == []
    assert steps(in_run(), ()) == [Preload()]
    assert steps(in_run().ended(), ()) == []
    assert steps(in_run().ended(), (RUN,)) == [Unload()]


def test_commits_a_seed_in_the_train_window_only() -> None:
    assert steps(in_run()) == []
    assert steps(in_run().opened("train")) == [CommitSeed(1)]
    assert steps(in_run().opened("train"), ()) == [Preload(), CommitSeed(1)]
    assert steps(in_run().opened("train").seed_committed()) == []
    assert steps(in_run().opened("train").closed("train")) == []


def test_takes_no_part_in_a_cycle_whose_head_it_could_not_check() -> None:
    story = trained().scored().headed(2).opened("train", 2)
    assert [type(step).__name__ for step in steps(story)] == ["Cosign"]
    assert steps(story.say("run", 2, "cosigned", validator=ME)) == [CommitSeed(2)]


def test_takes_no_part_while_the_log_counts_another_stake_than_its_roster() -> None:
    """It said once that it agrees: what the roster says later concerns later runs, and who joined since."""
    story = Run().created().validators(ME, OTHER, stakes={OTHER: 9.0}).selected().headed()
    story.say("run", 1, "cosigned", validator=ME).opened("train")
    assert steps(story) == [Doubt(1, (OTHER,))]
    told = story.seed_committed().closed("train").scored().headed(2).opened("train", 2)
    told.say("run", 2, "cosigned", validator=ME)
    assert steps(told) == [CommitSeed(2)]
    assert steps(told.validators("UNEW", stakes={"UNEW": 9.0})) == [Doubt(2, ("UNEW",))]


def test_reveals_only_after_submissions_are_settled_and_validate_opened() -> None:
    story = trained()
    assert steps(story) == []
    assert steps(story.opened("validate")) == []
    assert steps(story.settled("submit", submissions=[])) == [RevealSeed(1)]
    assert steps(story.seed_revealed()) == []


@pytest.mark.parametrize("missing", ["opened", "settled"])
def test_one_of_the_two_is_not_enough(missing: str) -> None:
    story = trained()
    story = story.settled("submit", submissions=[]) if missing == "opened" else story.opened("validate")
    assert steps(story) == []


def test_does_not_reveal_after_the_draw_nor_when_not_expected_nor_what_it_did_not_commit_to() -> None:
    assert not any(isinstance(step, RevealSeed) for step in steps(settled().opened("validate", expected=[OTHER])))
    assert not any(isinstance(step, RevealSeed) for step in steps(settled().opened("validate").drawn(OTHER)))
    assert objection(settled(secret=b"x" * 32).opened("validate")) == c.FINDING_KIND_RULE_HISTORY


def test_scores_when_drawn_and_reports_once() -> None:
    assert steps(scoring()) == [Score(1)]
    assert steps(scoring().reported()) == []
    assert steps(scoring().reported(OTHER)) == [Score(1)]
    assert steps(scoring().closed("validate", cause=c.CLOSE_CAUSE_DEADLINE)) == []


def test_the_omitted_do_not_score() -> None:
    story = (
        in_run()
        .opened("train")
        .seed_committed()
        .seed_committed(OTHER)
        .opened("validate")
        .settled("submit", submissions=[])
    )
    assert steps(story.seed_revealed().seed_revealed(OTHER).drawn(OTHER)) == []


def test_waits_for_the_commitments_that_the_draw_is_checked_against() -> None:
    story = in_run().opened("train").seed_committed().closed("commit").closed("submit").opened("validate")
    story.settled("submit", submissions=[]).seed_revealed().seed_revealed(OTHER).drawn(ME, OTHER)
    assert steps(story) == []
    assert steps(story.seed_committed(OTHER).closed("train")) == [Score(1)]


def objection(story: Run) -> int:
    (step,) = steps(story)
    assert isinstance(step, Object)
    return step.finding.kind


def test_a_wrong_seed_is_refused() -> None:
    story = scoring()
    drawn = SeedDrawn(run=RUN, cycle=1, seed=b"\x01" * 32, validators=[ME, OTHER], last_sequence=story.last("VALIDATE"))
    assert objection(story.put("validate", 1, "drawn", drawn)) == c.FINDING_KIND_RULE_SEED


def test_a_seed_drawn_over_fewer_than_it_names_is_refused() -> None:
    story = in_run().opened("train").seed_committed().seed_committed(OTHER).closed("train").opened("validate")
    story.settled("submit", submissions=[]).seed_revealed()
    assert objection(story.drawn(ME, OTHER)) == c.FINDING_KIND_RULE_DRAW


def test_a_reveal_that_opens_another_commitment_is_refused() -> None:
    story = in_run().opened("train").seed_committed().seed_committed(OTHER, secret=b"y" * 32).closed("train")
    story.opened("validate").settled("submit", submissions=[]).seed_revealed().seed_revealed(OTHER)
    assert objection(story.drawn(ME, OTHER)) == c.FINDING_KIND_RULE_DRAW


def test_a_draw_of_nobody_is_refused() -> None:
    story = trained().opened("validate")
    assert objection(story.drawn(seed=b"\x02" * 32)) == c.FINDING_KIND_RULE_SEED


_TELLING = (
    lambda story: story.opened("train"),
    lambda story: story.seed_committed(),
    lambda story: story.seed_committed(OTHER),
    lambda story: story.closed("train"),
    lambda story: story.closed("commit"),
    lambda story: story.closed("submit"),
    lambda story: story.settled("submit", submissions=[]),
    lambda story: story.opened("validate"),
    lambda story: story.seed_revealed(),
    lambda story: story.seed_revealed(OTHER),
    lambda story: story.drawn(ME, OTHER),
)

_STREAMS = {"TRAIN": (0, 1, 2, 3), "COMMIT": (4,), "SUBMIT": (5, 6), "VALIDATE": (7, 8, 9, 10)}


@settings(deadline=None, max_examples=150)
@given(streams=st.permutations([stream for stream, told in _STREAMS.items() for _ in told]))
def test_in_whatever_order_streams_are_read_nothing_is_said_too_early(streams: list[str]) -> None:
    story, unread = in_run(), {stream: iter(told) for stream, told in _STREAMS.items()}
    order = [next(unread[stream]) for stream in streams]
    for position, index in enumerate(order):
        _TELLING[index](story)
        known = set(order[: position + 1])
        for step in steps(story):
            if isinstance(step, RevealSeed):
                assert {0, 1, 6, 7} <= known, "the seed was revealed while submissions could still change"
                assert not {8, 10} & known
            if isinstance(step, Score):
                assert {*range(8), 10} <= known
            if isinstance(step, CommitSeed):
                assert not {1, 3} & known
    assert steps(story) == [Score(1)]


def test_keys_are_unique_per_run_cycle_and_step() -> None:
    second = trained().scored().headed(2).say("run", 2, "cosigned", validator=ME).opened("train", 2)
    stories = [in_run().opened("train"), scoring(), second]
    keys = [[action.key for action in decide(s.facts, ME, my_secret, (), even).actions] for s in stories]
    flat = list(itertools.chain(*keys))
    assert {"r1/0/preload", "r1/1/commitseed", "r1/1/score", "r1/2/commitseed"} <= set(flat)


def checked_run(head: str = "first") -> Run:
    """As an operator may show it twice: the same first message, and another head behind it."""
    story = Run().created().validators(ME, OTHER).selected()
    return story.say("run", 1, "head", checkpoint=head).say("run", 1, "cosigned", validator=ME)


def test_the_secrets_of_a_log_that_only_began_the_same_are_others() -> None:
    """An operator that runs a job for itself first would know every seed of the run that it shows afterwards."""
    secret = actions.secret_of(Identity.generate(b"v" * 32))
    once, again = checked_run().facts, checked_run("other").facts
    assert once.log_id == again.log_id
    assert secret(once, 1) != secret(again, 1)
    assert secret(once, 1) == secret(checked_run().facts, 1)


def test_objects_to_its_own_commitment_from_another_log() -> None:
    story = checked_run().opened("train").seed_committed(secret=b"x" * 32).seed_committed(OTHER).closed("train")
    assert steps(story) == []
    story.settled("submit", submissions=[]).opened("validate")
    assert objection(story) == c.FINDING_KIND_RULE_HISTORY
    mine = checked_run().opened("train").seed_committed().seed_committed(OTHER).closed("train")
    assert steps(mine.settled("submit", submissions=[]).opened("validate")) == [RevealSeed(1)]

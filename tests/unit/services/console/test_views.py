from __future__ import annotations

from typing import cast

import pytest
from connito.protocol.quorum import OVERDUE_MS
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.views import words
from connito.views.run_report import miner_name
from connito.views.standings import validator_rows
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key

from services.console import views
from services.console.heatmap import heatmap
from services.console.history import in_order, replay
from services.console.lineage import lineage
from services.console.waterfall import waterfall
from services.console.why import why
from tests.support.run import Run, even, theta
from tests.unit.services.console.world import LATE, MERGED, RUN, START, UNSURE, V1, V2, a_run, begun, end


@pytest.fixture
def story() -> Run:
    return a_run()


def test_every_reason_has_words() -> None:
    names = {reason_name(number) for number in reasons_pb2.Reason.values() if number}
    assert set(words.REASONS) == names
    assert words.in_words(cast(reasons_pb2.Reason.ValueType, 9999)) == "reason 9999"


def test_a_list_of_runs_shows_where_each_stands(story: Run) -> None:
    (row,) = views.run_rows({RUN: story.facts, "unborn": RunFacts("unborn")}, story.now, even)
    assert (row.head.run, row.head.domain, row.head.base, row.head.status) == (RUN, "medical", "tiny", "running")
    assert row.head.phase == "cycle 2 of 3: validate, validators score"
    assert (row.first_loss, row.last_loss, row.head.miners, row.head.validators) == (2.0, 1.9, 3, 2)


def test_no_loss_is_shown_before_one_was_published() -> None:
    story = begun()
    (row,) = views.run_rows({RUN: story.facts}, story.now, even)
    assert (row.first_loss, row.last_loss) == (None, None)
    assert views.curves(story.facts) == []


def test_an_open_window_counts_down_and_an_overdue_one_is_stale(story: Run) -> None:
    head = views.head(story.facts, story.now, even)
    assert head.window == "validate"
    assert head.deadline_unix_ms > story.now
    assert head.stale == ""
    assert "validate" in views.head(story.facts, head.deadline_unix_ms + OVERDUE_MS + 1, even).stale
    assert views.run_rows({RUN: story.facts}, head.deadline_unix_ms + OVERDUE_MS + 1, even)[0].head.stale


def test_an_ended_run_waits_for_nothing(story: Run) -> None:
    end(story)
    head = views.head(story.facts, story.now + 10**9, even)
    assert (head.status, head.window, head.deadline_unix_ms, head.stale) == ("completed", "", 0, "")


def test_a_failed_run_says_why_in_words() -> None:
    story = begun()
    failed = run_pb2.RunEnded(
        run=RUN,
        outcome=run_pb2.RUN_OUTCOME_FAILED,
        reason=reasons_pb2.REASON_TOO_FEW_MINERS,
        detail="1 of 3 came",
    )
    story.publish("run", 0, "ended", failed)
    head = views.head(story.facts, story.now, even)
    assert (head.status, head.detail) == ("failed", "1 of 3 came")
    assert head.reason == words.REASONS["too-few-miners"]


def test_miners_have_a_status_a_reason_in_words_and_no_invented_figures(story: Run) -> None:
    rows = {row.key: row for row in views.miner_rows(story.facts, 1)}
    assert [rows[MERGED].name, rows[MERGED].status, rows[MERGED].rank, rows[MERGED].reward] == [
        "alice",
        "merged",
        1,
        100,
    ]
    assert rows[UNSURE].status == "rejected"
    assert rows[UNSURE].reason == words.REASONS["not-significant"]
    assert rows[LATE].status == "refused"
    assert rows[LATE].detail == "1.0 s late"
    # It was never judged: no utility and no reward, rather than zero.
    assert (rows[LATE].utility, rows[LATE].reward, rows[LATE].scored) == (None, None, False)
    running = {row.key: row for row in views.miner_rows(story.facts, 2)}
    assert (running[MERGED].status, running[MERGED].reward, running[MERGED].total_reward) == ("revealed", None, 100)
    assert running[MERGED].scored


def test_curves_begin_at_the_base_and_have_the_target_first(story: Run) -> None:
    target, general = views.curves(story.facts)
    assert (target.domain, target.target, target.points) == ("medical", True, ((0, 2.0), (1, 1.9)))
    assert (general.domain, general.target) == ("code", False)
    assert general.change == pytest.approx(0.01)


def test_a_waterfall_names_the_last_and_the_missing(story: Run) -> None:
    bars = {bar.window: bar for bar in waterfall(story.facts, 1, story.now)}
    assert list(bars) == ["train", "commit", "submit", "validate", "merge"]
    train, commit = bars["train"], bars["commit"]
    assert (train.start_ms, train.end_ms, train.missing) == (0, 13_000, ())
    assert train.last is not None
    assert (train.last.who, train.last.at_ms) == ("ULATE…", 12_000)
    assert commit.by_deadline
    assert commit.missing == ("ULATE…",)
    assert "did not act: ULATE…" in commit.summary


def test_an_open_window_reaches_to_now_and_not_past_its_deadline(story: Run) -> None:
    (validate,) = [bar for bar in waterfall(story.facts, 2, story.now + 5000) if bar.window == "validate"]
    assert validate.open
    assert validate.end_ms - validate.start_ms == 7000
    assert validate.missing == ("UVALIDATORTW…",)
    (late,) = [bar for bar in waterfall(story.facts, 2, story.now + 10**9) if bar.window == "validate"]
    assert late.end_ms - late.start_ms == 60_000


def test_why_shows_what_each_validator_measured_and_who_was_silent(story: Run) -> None:
    found = why(story.facts, 1, UNSURE)
    assert found is not None
    (measured,) = found.measurements
    score = measured.score
    assert (score.effect, score.effect_low, score.effect_high) == (0.01, -0.02, 0.04)
    assert score.reason == reasons_pb2.REASON_NOT_SIGNIFICANT
    assert measured.standing is not None
    assert measured.standing.deviation == 0.003
    assert found.silent == (miner_name(story.facts, V2),)
    assert found.verdict is not None
    assert found.verdict.status == cycle_pb2.VERDICT_STATUS_REJECTED
    assert (found.verdict.reason, found.verdict.utility) == (reasons_pb2.REASON_NOT_SIGNIFICANT, 0.0)
    assert found.margin == 0.02
    assert [step.text.split()[0] for step in found.steps] == ["trained", "committed", "the", "revealed", "the"]


def test_validators_show_what_their_word_weighs_and_why_it_lost(story: Run) -> None:
    spec, scored = story.facts.spec, story.facts.scored(1)
    assert spec is not None
    assert scored is not None
    spec.rewards.bond_rate = 0.1
    for row, trust in zip(scored.validators, (1.0, 0.9), strict=True):
        row.trust, row.weight, row.agreement = trust, 1.0, trust
    scored.validators[1].reason = reasons_pb2.REASON_SEED_WITHHELD
    scored.miners.append(cycle_pb2.MinerStanding(miner=MERGED, mu=27.5, sigma=8.1, judged=1, useful=1))
    first, second = validator_rows(story.facts, 1)
    assert (first.reported, first.trust, first.reason) == (True, 1.0, "")
    assert (second.reported, second.trust, second.reason) == (False, 0.9, "seed-withheld")
    found = why(story.facts, 1, MERGED)
    assert found is not None
    standing = found.measurements[0].standing
    assert standing is not None
    assert (found.rating, standing.weight, standing.trust) == ("27.5 ± 8.1", 1.0, 1.0)
    rows = {row.key: row for row in views.miner_rows(story.facts, 1)}
    assert (rows[MERGED].rating, rows[UNSURE].rating) == ("27.5 ± 8.1", "")


def test_why_of_somebody_who_was_refused_or_is_unknown(story: Run) -> None:
    refused = why(story.facts, 1, LATE)
    assert refused is not None
    assert (refused.verdict, refused.measurements) == (None, ())
    assert refused.steps[-1].text.startswith("refused: committed after the window had closed")
    assert why(story.facts, 1, "USTRANGER") is None
    assert why(story.facts, 7, MERGED) is None


def test_before_the_verdict_a_score_is_not_judged_yet(story: Run) -> None:
    found = why(story.facts, 2, MERGED)
    assert found is not None
    assert found.verdict is None
    assert [item.validator for item in found.measurements] == [miner_name(story.facts, V1)]
    assert found.measurements[0].standing is None


def test_a_heatmap_reaches_as_far_as_the_selection(story: Run) -> None:
    grid = heatmap(story.facts)
    assert grid is not None
    assert [layer for layer, _ in grid.layers] == [0, 1]
    assert grid.columns == 6
    cells = dict(grid.layers)[1]
    assert [(cell.expert, cell.rank, cell.helper) for cell in cells if cell.rank or cell.helper] == [
        (0, 0, True), (2, 2, False), (5, 1, False),
    ]  # fmt: skip
    assert heatmap(RunFacts(RUN)) is None


def test_a_lineage_that_holds_and_one_that_does_not(story: Run) -> None:
    base, first = lineage(story.facts)
    assert (base.version, base.published, base.broken) == (0, None, "")
    assert first.published is not None
    assert (first.version, first.published.parent, first.merged) == (1, 0, (("alice", 1.0),))
    assert first.state.digest == theta(1).digest
    assert first.broken == ""
    other = Run(now=story.now)
    for fact in in_order(story.facts):
        if (opened := story.facts.window("train", 2).opened) is not None and fact.message == opened:
            opened.state.CopyFrom(theta(77))
        other.facts.add(fact)
    assert "cycle 2 started from version 1 with another state" in lineage(other.facts)[1].broken


def test_a_replay_is_the_run_as_it_was(story: Run) -> None:
    end(story)
    length = len(story.facts.facts)
    past, moment = replay(story.facts, 1)
    assert (len(past.facts), moment.first, moment.time_unix_ms, moment.seconds) == (1, True, START, 0.0)
    before_version = next(
        place for place, fact in enumerate(in_order(story.facts)) if fact.key.kind == "version"
    )  # so many facts come before it
    past, _ = replay(story.facts, before_version)
    assert past.version(1) is None
    past, moment = replay(story.facts, before_version + 1)
    assert past.version(1) is not None
    assert "version 1" in moment.text
    past, moment = replay(story.facts, 10**6)
    assert (moment.position, moment.last) == (length, True)
    assert past.facts == story.facts.facts


def test_names_stand_for_keys_once_and_are_looked_up_once_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    story = begun()
    keys = [f"UA{letter}{'B' * 53}" for letter in "CDEF"]
    # A name that looks like the next one's key stays as it was given.
    for key, other in zip(keys, [*keys[1:], keys[0]], strict=True):
        story.miners(key, label=f"not {short_key(other)}").refused(
            "submit", key, detail=f"copies {short_key(key)} of U…"
        )
    asked: list[str] = []

    def counted(key: str) -> str:
        asked.append(key)
        return short_key(key)

    monkeypatch.setattr(views, "short_key", counted)
    rows = {row.key: row for row in views.miner_rows(story.facts, 1)}
    for key, other in zip(keys, [*keys[1:], keys[0]], strict=True):
        assert rows[key].detail == f"copies not {short_key(other)} of U…"
    assert len(asked) == len(story.facts.miners)

"""A run in which the seed assigns each submission to two of three validators, evaluation races, new keys share a quota
and are on probation, and validators earn a part: it audits clean, and its ledger adds up to the unit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Finished, Up
from .test_audit import audit, connito

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

POLICY = {
    "scoring.validators_per_submission": 2,
    "scoring.minimum_sequences": 4,
    "rewards.payout": "proportional",
    "rewards.validator_share": 0.1,
    "rewards.probation_cycles": 1,
    "rewards.newcomers_per_cycle": 3,
}
EMISSION = 1_000_000


@pytest.fixture(scope="module")
def run(up: Up) -> Finished:
    overrides = [part for name, value in POLICY.items() for part in ("--set", f"{name}={value}")]
    done = up(
        "--cycles", "2", "--miners", "3", "--validators", "3", "--seed", "5", "--adversaries", "freerider", *overrides
    )
    assert done.code == 0, done.explain()
    return done


def rows(run: Finished, cycle: int) -> dict[str, dict[str, Any]]:
    return {row["miner"]: row for row in run.report["cycles"][cycle - 1]["submissions"]}


@pytest.fixture(scope="module")
def receipts(run: Finished) -> list[dict[str, Any]]:
    def told() -> Iterator[dict[str, Any]]:
        for miner, row in rows(run, 2).items():
            if row["status"] in ("merged", "scored", "rejected"):
                done = connito("explain", f"{run.report['run']}/2/{miner}", "--from", run.data, "--json", "--no-model")
                assert done.returncode == 0, done.stderr
                yield json.loads(done.stdout)

    return list(told())


def test_it_audits_clean_with_the_model(run: Finished) -> None:
    code, document, errors = audit(run, run.data, "--threads", "1")
    assert (code, document["differences"]) == (0, []), errors
    checks = {(row["cycle"], row["check"]): row for row in document["checks"]}
    assert checks[2, "losses"]["note"].endswith("equal to the bit")
    assert checks[2, "merge"]["note"].endswith("equal to the bit")


def test_each_submission_is_scored_by_the_two_that_the_seed_assigns(receipts: list[dict[str, Any]]) -> None:
    assert len(receipts) == 4
    duties: dict[str, int] = {}
    for receipt in receipts:
        assert len(receipt["draw"]["validators"]) == 3
        assert sorted(report["validator"] for report in receipt["reports"]) == sorted(receipt["draw"]["assigned"])
        assert len(receipt["draw"]["assigned"]) == 2
        for validator in receipt["draw"]["assigned"]:
            duties[validator] = duties.get(validator, 0) + 1
    assert sorted(duties.values()) == [2, 3, 3]


def test_evaluation_stops_where_it_is_decided(receipts: list[dict[str, Any]]) -> None:
    evaluated = {receipt["label"]: receipt["reports"][0]["evaluated_sequences"] for receipt in receipts}
    assert set(evaluated.values()) <= {4, 8, 16, 32}
    assert evaluated["freerider-1"] == 4
    assert min(evaluated.values()) < 32


def test_three_new_keys_have_a_place_and_the_fourth_waits_a_cycle(run: Finished) -> None:
    first, second = rows(run, 1), rows(run, 2)
    told = [row for row in first.values() if row["reason"] == "newcomer-quota"]
    assert len(told) == 1
    assert (told[0]["status"], told[0]["reward"]) == ("refused", 0)
    assert "commit again" in told[0]["detail"]
    assert second[told[0]["miner"]]["status"] in ("merged", "scored", "rejected")
    assert "newcomer-quota" not in {row["reason"] for row in second.values()}


def test_probation_withholds_half_until_work_was_useful(run: Finished) -> None:
    first, second = rows(run, 1), rows(run, 2)
    paid = [row for row in first.values() if row["reward"]]
    assert paid
    # The half of an odd reward is rounded to the even one of its neighbours.
    assert all(abs(row["withheld"] - row["reward"]) <= (row["withheld"] + row["reward"]) % 2 for row in paid)
    assert all(second[row["miner"]]["withheld"] == 0 for row in paid)


def test_the_ledger_adds_up_to_the_unit(run: Finished, tmp_path: Path) -> None:
    name = run.report["run"]
    done = connito("ledger", name, "--from", run.data, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["emission"], document["payout"], document["conserved"]) == (EMISSION, "proportional", True)
    for cycle in (1, 2):
        entries = [entry for entry in document["entries"] if entry["cycle"] == cycle]
        assert sum(entry["units"] for entry in entries) == EMISSION
        assert sum(entry["units"] for entry in entries if entry["role"] == "validator") == EMISSION // 10
        assert run.report["cycles"][cycle - 1]["paid"]["validators"] == EMISSION // 10
    assert sum(document["balances"].values()) == 2 * EMISSION
    one = json.loads(connito("ledger", name, "--from", run.data, "--account", "miner-1", "--json").stdout)
    assert {entry["name"] for entry in one["entries"]} == {"miner-1"}
    text = connito("ledger", name, "--from", run.data).stdout
    assert "every unit is accounted for" in text
    gone = connito("ledger", "no-such-run", "--from", run.data)
    assert (gone.returncode, "Traceback" in gone.stderr) == (4, False)


def test_validators_that_agree_keep_their_weight_and_miners_are_rated(run: Finished) -> None:
    for cycle in run.report["cycles"]:
        assert [row["trust"] for row in cycle["validators"]] == [1.0, 1.0, 1.0]
        assert not any(row["reason"] for row in cycle["validators"])
    ratings = run.report["totals"]["ratings"]
    assert set(ratings) == {"miner-1", "miner-2", "miner-3", "freerider-1"}
    assert ratings["freerider-1"]["mu"] < 25 < max(rating["mu"] for rating in ratings.values())

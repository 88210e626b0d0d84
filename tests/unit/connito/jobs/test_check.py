"""A whole check, on a base in a folder and without a platform."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from connito.errors import Invalid, NotFound
from connito.jobs.check import Checked, check
from connito.jobs.findings import require
from connito.jobs.quote import quote
from connito.jobs.spec import parse_job

# The byte tokenizer makes a lot of sequences of a little text; the policies of the demo base would ask for more.
SHORT = {"training": {"sequence_length": 64, "local_steps": 4}}


def run(customer: Path, **fields: Any) -> Checked:
    job = {
        "domain": "code", "base": "base", "data": [{"path": "code.jsonl"}], "license": "PSF-2.0", "policies": SHORT,
        "general": [{"domain": "prose", "path": "prose.jsonl"}], "data_statement": "Python.", **fields,
    }  # fmt: skip
    return check(parse_job(job), customer, customer / "no-platform")


def finding(checked: Checked, check: str, level: str = "") -> Any:
    return next(row for row in checked.findings if row.check == check and (not level or row.level == level))


def test_a_good_job_has_numbers_for_everything(customer: Path) -> None:
    checked = run(customer)

    assert checked.ok, [row for row in checked.findings if row.level == "error"]
    document = json.loads(json.dumps(checked.to_json()))
    assert {row["check"] for row in document["findings"]} >= {
        "reach", "duplicates", "contamination", "licence", "privacy", "size", "length", "tokenizer",
    }  # fmt: skip
    assert set(document["parts"]) == {"probe", "train", "holdout", "general prose"}
    assert document["fit"]["target"]["bytes_per_token"] == pytest.approx(1.0)
    corpora = checked.corpora
    assert corpora is not None
    assert corpora.train.metadata["tokenizer"] == corpora.holdout.metadata["tokenizer"]
    assert corpora.train.document(0).tolist() == [*checked.texts.train[0].text.encode(), 256], "with its end"


def test_the_same_job_gives_the_same_corpora(customer: Path) -> None:
    one, two = run(customer).corpora, run(customer).corpora

    assert one is not None
    assert two is not None
    assert one.train.to_bytes() == two.train.to_bytes()
    assert one.holdout.to_bytes() == two.holdout.to_bytes()


def test_a_tokenizer_that_does_not_fit_is_told_beside_the_general_text(customer: Path) -> None:
    (customer / "greek.txt").write_text(
        "\n\n".join(f"σελήνη θάλασσα {n} νύξ ποταμός χειμών λύρα " * 40 for n in range(90))
    )

    row = finding(run(customer, data=[{"path": "greek.txt"}]), "tokenizer")

    assert row.level == "warning"
    assert row.numbers["target"]["fallback"] > 0.5 > row.numbers["general"]["fallback"]


@pytest.mark.parametrize(
    ("licence", "level", "said"),
    [
        ("CC-BY-NC-4.0", "ok", "no commercial use"),
        ("CC-BY-ND-4.0", "error", "no derivatives"),
        # As what is composed of experts of several licences has them.
        ("Apache-2.0 AND CC-BY-NC-4.0", "ok", "no commercial use"),
        ("Apache-2.0 AND Apache 3", "error", "not a licence identifier"),
        ("Apache 2", "error", "did you mean Apache-2.0"),
        ("LicenseRef-ours", "warning", "licence of your own"),
    ],
)
def test_licences(customer: Path, licence: str, level: str, said: str) -> None:
    row = finding(run(customer, license=licence), "licence", level)

    assert said in row.detail + row.remedy


def test_a_budget_that_nothing_fits_into(customer: Path) -> None:
    checked = run(customer, budget={"upload": "10 B", "memory": "1 kB"})

    errors = [row for row in checked.findings if row.check == "budget" and row.level == "error"]
    assert ["budget.upload" in row.detail for row in errors] == [True, False]
    with pytest.raises(Invalid, match="2 problems"):
        require(checked.findings)


def test_too_little_text_says_how_much_is_missing(customer: Path) -> None:
    (customer / "little.txt").write_text("\n\n".join(f"One short line, number {n}." * 60 for n in range(6)))

    checked = run(customer, data=[{"path": "little.txt"}])

    assert not checked.ok
    assert any(
        "Add about" in row.detail or "add about" in row.remedy for row in checked.findings if row.level == "error"
    )


def test_without_general_text_and_platform_forgetting_cannot_be_measured(customer: Path) -> None:
    row = finding(run(customer, general=[]), "size", "error")

    assert "forgetting could not be measured" in row.detail


def test_what_should_not_leave_the_house_is_pointed_at(customer: Path) -> None:
    text = "Write to jane.doe@example.org or +44 20 7946 0958."
    (customer / "mail.jsonl").write_text(json.dumps({"text": text}) + "\n")
    sources = [{"path": "code.jsonl"}, {"path": "mail.jsonl"}]

    row = finding(run(customer, data=sources, split={"holdout": 0.05, "probe": 0.05}), "privacy", "warning")

    assert "e-mail addresses" in row.detail
    assert "mail.jsonl:1" in row.detail


def test_a_base_that_is_nowhere(customer: Path) -> None:
    with pytest.raises(NotFound, match="neither one that a run of yours or a public one used"):
        run(customer, base="gpt-9")


def test_a_policy_that_does_not_exist(customer: Path) -> None:
    with pytest.raises(Invalid, match="training has no field 'lokal_steps'"):
        run(customer, policies={"training": {"lokal_steps": 3}})


def test_the_quote_is_what_the_selector_chooses_and_the_pilot_measures(customer: Path) -> None:
    made = quote(run(customer, objective={"improvement": 0.001, "max_cycles": 3}))

    document = json.loads(json.dumps(made.to_json()))
    assert document["experts"]["total"] == 8
    assert 0 < document["experts"]["selected"] <= 8
    assert document["bytes"]["upload_per_miner"] == 3 * document["bytes"]["upload"]
    assert document["bytes"]["memory"]["activations"] > 0
    assert document["pilot"]["steps"] == 4
    assert document["seconds"]["from"].startswith("the pilot's")
    assert made.pilot is not None
    assert made.cycles_needed == (math.ceil(0.001 / made.pilot.gain) if made.pilot.low > 0 else None)
    without = quote(run(customer), pilot=False)
    assert (without.pilot, without.seconds) == (None, None)
    assert without.layers == made.layers


def test_a_memory_budget_is_held_against_the_quote(customer: Path) -> None:
    checked = run(customer)
    need = quote(checked, pilot=False).memory.total

    tight = quote(run(customer, budget={"memory": need - 1}), pilot=False)

    assert [row.level for row in tight.findings if row.check == "budget"] == ["error"]
    assert any("budget.memory allows" in row.detail for row in tight.findings)

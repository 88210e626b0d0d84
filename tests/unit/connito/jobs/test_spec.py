from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from connito.errors import Invalid, NotFound
from connito.jobs.spec import is_job, parse_job, parse_size, read_job, read_run_spec

SMALL = {"domain": "contracts", "data": [{"path": "texts/"}], "license": "CC-BY-4.0"}


def test_three_fields_are_a_job() -> None:
    job = parse_job(SMALL)

    assert (job.base, job.cycles, job.start_from, job.privacy.visibility) == ("demo", 4, "auto", "public")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"domain": "two words"}, "domain: use 1 to 64 letters, digits, '-' and '_' (given: 'two words')"),
        ({"run": "a b"}, "run: use 1 to 64 letters, digits, '-' and '_' (given: 'a b')"),
        ({"domain": 7}, "domain: has to be text: put it in quotes (given: 7)"),
        ({"policies": {"training": None}}, "policies.training: has to be a mapping: write `field: value`, one a line"),
        ({"split": 0.2}, "split: has to be a mapping"),
        ({"data": "texts/"}, "data: has to be a list: begin each entry with `-` (given: 'texts/')"),
        ({"data": []}, "data: is empty: give at least one entry"),
        ({"budget": {"upload": 10**30}}, "budget.upload: "),
        ({"data_statement": "x" * 4001}, "(given: 'xx"),
        ({"licence": "MIT"}, "licence: there is no such field; known fields: base, benchmarks"),
        ({"data": []}, "data: "),
        (
            {"data": [{"path": "x", "weigth": 2}]},
            "data[0].weigth: there is no such field; known fields: config, name, path",
        ),
        ({"data": [{"path": "x", "weight": 0}]}, "data[0].weight: "),
        ({"budget": {"upload": "a lot"}}, "'a lot' is not a size; write for example 20 MB"),
        ({"privacy": {"visibility": "secret"}}, "privacy.visibility: choose one of public"),
        ({"privacy": {"visibility": "organisation"}}, "say which in privacy.organisation"),
        ({"general": [{"domain": "contracts", "path": "y"}]}, "twice, or the job's own domain"),
        ({"benchmarks": [{"name": "a", "path": "y"}, {"name": "a", "path": "z"}]}, "benchmarks names 'a' twice"),
    ],
)
def test_what_cannot_be_is_named(
    change: dict[str, dict[str, str] | float | list[dict[str, int | str]] | str], said: str
) -> None:
    with pytest.raises(Invalid) as caught:
        parse_job({**SMALL, **change}, "job.yaml")

    assert said in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.exit_code == 3


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(Invalid) as caught:
        parse_job({"domain": "x", "colour": "red"}, "job.yaml")

    assert "data: is missing; list the text to train on" in str(caught.value)
    assert "license: is missing; give the SPDX identifier" in str(caught.value)
    assert "colour: there is no such field" in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no file"):
        read_job(tmp_path / "job.yaml")
    (tmp_path / "job.yaml").write_text("- just a list")
    with pytest.raises(Invalid, match="holds no mapping"):
        read_job(tmp_path / "job.yaml")
    (tmp_path / "job.yaml").write_text("policies: {training: {beta1: 0.1}}\npolicies: {training: {local_steps: 2}}\n")
    with pytest.raises(Invalid, match=r"'policies' is given twice.*line 2"):
        read_job(tmp_path / "job.yaml")
    (tmp_path / "job.yaml").write_text("a: [")
    with pytest.raises(Invalid, match="cannot be read as YAML"):
        read_job(tmp_path / "job.yaml")


@pytest.mark.parametrize(("text", "size"), [("20 MB", 20_000_000), ("1.5GiB", 1_610_612_736), ("7", 7), (12, 12)])
def test_sizes_are_read_as_people_write_them(text: int | str, size: int) -> None:
    assert parse_size(text) == size


def test_the_smaller_cap_on_cycles_holds() -> None:
    assert parse_job({**SMALL, "budget": {"cycles": 2}, "objective": {"max_cycles": 6}}).cycles == 2


@pytest.mark.parametrize(
    ("content", "job"),
    [
        (SMALL, True),
        ({"domain": "x", "license": "MIT"}, True),
        ({"domain": "x", "cycles": 2, "probe": {}}, False),
        ({"domain": "x", "generalHoldouts": []}, False),
    ],
)
def test_a_job_that_lacks_its_data_is_still_a_job_and_not_a_run_spec(
    content: dict[str, dict[Any, Any] | int | list[dict[str, str]] | str], job: bool
) -> None:
    assert is_job(content) is job


def test_who_may_mine_is_the_customer_s_to_say() -> None:
    people = {"enrolment": "invite", "allowed": ["UA"], "at_most": 5}

    assert parse_job({**SMALL, "people": people}).people.enrolment == "invite"
    with pytest.raises(Invalid, match=r"people\.enrolment"):
        parse_job({**SMALL, "people": {"enrolment": "friends"}}, "job.yaml")


def test_a_run_spec_with_a_field_of_its_own_is_told_the_fields_once(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("cycles: 2\nbogus: 1\n")
    with pytest.raises(Invalid, match=r'no field named "bogus".*Its fields: run, domain, cycles') as caught:
        read_run_spec(tmp_path / "spec.yaml")
    assert "Available" not in str(caught.value)

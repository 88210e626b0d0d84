"""General text is replayed by default, at the smallest share at which a pilot holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from connito.data.corpus import Corpus
from connito.jobs import pilot, replay
from connito.jobs.check import Checked, check
from connito.jobs.pilot import Trial
from connito.jobs.spec import parse_job

SHORT = {
    "training": {"sequence_length": 16, "local_steps": 4, "batch_sequences": 2},
    "scoring": {"target_sequences": 8, "general_sequences": 8},
    "merging": {
        "gate_target_sequences": 4, "gate_general_sequences": 4, "report_target_sequences": 4, "report_general_sequences": 4,
    },
}  # fmt: skip


def with_training(**fields: float) -> dict[str, Any]:
    return {**SHORT, "training": {**SHORT["training"], **fields}}


def checked(customer: Path, **fields: Any) -> Checked:
    job = {
        "domain": "code", "base": "base", "data": [{"path": "code.jsonl"}], "license": "PSF-2.0", "policies": SHORT,
        "general": [{"domain": "prose", "path": "prose.jsonl"}], **fields,
    }  # fmt: skip
    return check(parse_job(job), customer, customer / "no-platform")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "cache_root", lambda: tmp_path)


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any amount of general text is enough for both."""
    monkeypatch.setattr("connito.jobs.texts.ENOUGH_FOR_BOTH", 1)


@pytest.mark.usefixtures("plenty")
def test_enough_general_text_is_replayed_without_being_asked_for(customer: Path) -> None:
    found = checked(customer)
    assert found.spec.training.replay_share == replay.SHARE
    assert found.corpora is not None
    assert found.corpora.replay is not None
    held = {
        found.corpora.general["prose"].document(i).tobytes() for i in range(found.corpora.general["prose"].documents)
    }
    read = {found.corpora.replay.document(i).tobytes() for i in range(found.corpora.replay.documents)}
    assert read
    assert not held & read


def test_little_general_text_is_all_held_out(customer: Path) -> None:
    found = checked(customer)
    assert (found.spec.training.replay_share, found.corpora and found.corpora.replay) == (0, None)


@pytest.mark.usefixtures("plenty")
@pytest.mark.parametrize(
    ("fields", "share"),
    [({"replay": 0}, 0), ({"replay": 0.5}, 0.5), ({"policies": with_training(replay_share=0.1)}, 0.1)],
)
def test_what_the_job_says_counts(customer: Path, fields: dict[str, Any], share: float) -> None:
    assert checked(customer, **fields).spec.training.replay_share == share


@pytest.mark.usefixtures("plenty")
def test_what_a_pilot_held_at_is_submitted_and_belongs_to_this_text_alone(customer: Path) -> None:
    found = checked(customer)
    assert found.corpora is not None
    assert found.corpora.replay is not None
    key = replay.pilot_key(found.spec, found.context, found.corpora.train, found.corpora.replay)
    replay.remember(key, 0.125)
    assert checked(customer).spec.training.replay_share == 0.125
    other = checked(customer, data=[{"path": "code.jsonl", "text": "{text}."}])
    assert other.spec.training.replay_share == replay.SHARE
    assert checked(customer, policies=with_training(learning_rate=0.1)).spec.training.replay_share == replay.SHARE


@pytest.mark.parametrize("content", [b"", b"{}", b'{"replay_share": 2}', b'{"replay_share": null}', b"\xff"])
def test_a_damaged_memory_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pilots").mkdir()
    (tmp_path / "pilots" / "k.json").write_bytes(content)
    assert replay.recall("k") is None


class Bench:
    """A pilot in which general text holds from a share on."""

    def __init__(self, holds_from: float) -> None:
        self.holds_from = holds_from

    def trial(self, share: float) -> Trial:
        numbers: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(Trial)}
        return Trial(**{**numbers, "replay": share, "retained": share >= self.holds_from})


@pytest.mark.parametrize(
    ("holds_from", "chosen", "retained"),
    [(0.0, 0.0, True), (0.1, 0.125, True), (0.2, 0.25, True), (0.4, 0.5, True), (0.9, 0.5, False)],
)
def test_the_search_ends_at_the_smallest_share_that_holds(holds_from: float, chosen: float, *, retained: bool) -> None:
    trials = pilot._search(Bench(holds_from))  # type: ignore[arg-type]
    assert (trials[-1].replay, trials[-1].retained) == (chosen, retained)
    assert len(trials) <= 3


def test_text_of_several_domains_is_mixed_evenly() -> None:
    from connito.base.corpora import mixed

    corpora = {
        name: Corpus.from_documents([[token] * 9] * 50, {"domain": name, "separator": "7"})
        for name, token in (("a", 1), ("b", 2))
    }
    found = mixed(corpora, 200)
    assert found is not None
    assert [found.document(index).tolist() for index in (0, 10)] == [[1] * 9 + [7], [2] * 9 + [7]]
    assert len(found.tokens) == 200
    assert mixed({}, 200) is None

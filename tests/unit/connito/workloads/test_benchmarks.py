"""What a run's benchmarks and tasks may ask of the platform, and what becomes of those that ask for more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from connito.data.corpus import Corpus
from connito.errors import Invalid
from connito.experts.harness import TaskScore
from connito.experts.tasks import ANSWER, CHOICE, Task
from connito.library.schema import read_record
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.run_pb2 import CorpusRef, RunSpec
from connito.workloads.benchmarks import measure
from safetensors.torch import save_file

ITEM: Any = {"given": "a", "choices": ["b", "c"], "answer": 0}
CHOICES = Task("quiz", CHOICE, [ITEM] * 2, [{"metric": "acc"}], {})
ANSWERS = Task(
    "sums", ANSWER, [{"given": "a", "answer": "b"}] * 2, [{"metric": "exact_match"}], {"generation_kwargs": {}}
)


class Embedding(torch.nn.Module):
    """A base with fifty tokens."""

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """As the models have it."""
        return torch.nn.Embedding(50, 1)


class Model:
    """An evaluator that is asked for no loss."""

    base: ClassVar[dict[str, Any]] = {}
    model = Embedding()

    def put(self, state: Any) -> None:
        """Take any state."""

    def restore(self) -> None:
        """Give the base back."""


def unscored(tmp_path: Path, data: bytes) -> str:
    (task := tmp_path / "task").write_bytes(data)
    save_file({"layers.0.down_proj": torch.zeros(1)}, state := tmp_path / "state.safetensors")
    spec = RunSpec(run="r", tasks=[CorpusRef(domain="quiz", artifact=ArtifactRef(digest="d"))])
    found = measure(Model(), None, spec, {"d": task}, "s", state)  # type: ignore[arg-type]
    assert not found.scores
    ((name, why),) = [(entry.name, entry.why) for entry in found.unscored]
    assert name == "quiz"
    # Whatever it holds can stand on a record, and in a message.
    read_record(json.dumps(_record({name: why})), "it")
    assert len(why.encode()) <= 200
    return why


def _record(missing: dict[str, str]) -> dict[str, Any]:
    empty: dict[str, Any] = {"name": "b", "manifest": "m"}
    return {
        "format": "f", "expert_id": "e", "domain": "d", "run": "r", "created": "", "base": empty,
        "expert": {"digest": "", "bytes": 0, "parameters": 0}, "model_parameters": 0, "losses": [], "lineage": [],
        "selection": {"method": "", "threshold": 0.0, "layers": {}, "selected": 0, "total": 0, "report": ""},
        "contributors": [], "license": "", "data_statement": "", "customer": "", "training_data": "", "unscored": missing,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (replace(CHOICES, metrics=[{"metric": "perplexity"}]), "scores multiple_choice by acc, acc_norm alone"),
        (replace(CHOICES, metrics=[{"metric": "acc", "hf_evaluate": True}]), "alone"),
        (replace(CHOICES, metrics=[cast(Any, "acc")]), "is no task"),
        (replace(CHOICES, items=[ITEM] * 501), "more than 500 items"),
        (replace(CHOICES, how={"dataset_path": "/etc"}), "in a way of its own"),
        (replace(ANSWERS, how={"generation_kwargs": {"num_beams": 900}}), "in a way of its own"),
        (replace(ANSWERS, how={"generation_kwargs": {"max_gen_toks": 1 << 30}}), "32,768 tokens in all"),
        (
            replace(ANSWERS, how={"filter_list": [{"name": "x", "filter": [{"function": "regex"}]}]}),
            "expressions of its own",
        ),
        (replace(ANSWERS, how={"filter_list": [{"name": "\x1b[2J"}]}), "names that nobody can read"),
        (replace(ANSWERS, how={"filter_list": 7}), "is no task"),
        (replace(CHOICES, items=[{**ITEM, "choices": ["b"] * 700_000}]), "more than 5,000 texts"),
        (replace(CHOICES, items=[{**ITEM, "given": "a" * 10_000, "choices": ["b"] * 2000}]), "letters in all"),
        (replace(CHOICES, items=[{**ITEM, "given": ["a"]}]), "is no task"),
        (replace(CHOICES, items=[{**ITEM, "choices": [7]}]), "is no task"),
        (replace(CHOICES, items=[cast(Any, "a")]), "is no task"),
        (replace(CHOICES, metrics=[{"metric": "acc"}] * 9), "more than 8 metrics"),
        (replace(CHOICES, how={"target_delimiter": " " * 41}), "more than 8 metrics, filters or ends"),
        (replace(ANSWERS, how={"generation_kwargs": {"until": ["x"] * 9}}), "or ends of answers"),
        (replace(ANSWERS, how={"generation_kwargs": {"until": "x" * 41}}), "too long ones"),
        (replace(ANSWERS, how={"generation_kwargs": {"do_sample": True, "temperature": 1e-40}}), "in a way of its own"),
        (replace(ANSWERS, how={"filter_list": [{"name": "x", "filter": []}] * 9}), "more than 8 metrics"),
        (replace(ANSWERS, how={"filter_list": [{"filter": [{"function": "lowercase"}] * 9}]}), "more than 8 metrics"),
        (replace(ANSWERS, how={"filter_list": [{"name": "x" * 41}]}), "names that nobody can read"),
    ],
    ids=lambda value: "" if isinstance(value, Task) else str(value)[:20],
)
def test_what_asks_too_much_of_the_platform_is_left_to_the_delivery_report(tmp_path: Path, task: Any, why: str) -> None:
    assert why in unscored(tmp_path, task.encode())


def test_what_is_no_task_or_a_large_one_is_named(tmp_path: Path) -> None:
    assert "names as a task is none" in unscored(tmp_path, b"\xff\x1b[2J")
    assert "more than 4,194,304 bytes" in unscored(tmp_path, b" " * (5 << 20))


def test_an_aggregator_without_the_harness_says_who_has_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A customer who reads the record has the harness perhaps, and could install it to no effect."""
    monkeypatch.setattr("connito.workloads.benchmarks.find_spec", lambda name: None)
    why = unscored(tmp_path, CHOICES.encode())
    assert why == "the platform's aggregator lacks connito[evaluate]: the delivery report has its scores"


def test_text_that_the_base_has_no_embeddings_for_is_never_put_to_it(tmp_path: Path) -> None:
    """Nobody else looks into a benchmark before, and on a GPU such a token ends the process."""
    tokens = np.array([1, 2, 50, 3] * 64, np.int32)
    Corpus(tokens, np.array([0, len(tokens)])).save(file := tmp_path / "exam.safetensors")
    save_file({"layers.0.down_proj": torch.zeros(1)}, state := tmp_path / "state.safetensors")
    spec = RunSpec(run="r", benchmarks=[CorpusRef(domain="exam", artifact=ArtifactRef(digest="d"))])
    found = measure(Model(), None, spec, {"d": file}, "s", state)  # type: ignore[arg-type]
    assert not found.scores
    assert "holds the token 50, and the base has 50" in found.unscored[0].why


class Passed(Embedding):
    """A base that a task is put to."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Return what it is given."""
        return given


class Losing(Model):
    """An evaluator that has losses, three batches of them, and passes of a task."""

    model = Passed()

    def losses(self, _: Any, rows: Any, on_batch: Any) -> Any:
        """Return one nat for each token."""
        for done in range(3):
            on_batch(done, 3)
        return np.ones(len(rows)), np.ones(len(rows), int)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return how a run with these exams and tasks is measured."""
    (file := tmp_path / "task").write_bytes(CHOICES.encode())
    save_file({"layers.0.down_proj": torch.zeros(1)}, state := tmp_path / "state.safetensors")
    evaluator: Any = Losing()
    tokens = np.array([1, 2, 3, 4] * 64, np.int32)
    Corpus(tokens, np.array([0, len(tokens)])).save(exam := tmp_path / "exam.safetensors")
    monkeypatch.setattr("connito.workloads.benchmarks.sequences", lambda *_: np.zeros((4, 3)))

    def run(between: Any, exams: int = 1, tasks: int = 1, scores: int = 1) -> Any:
        def asked(_: Any, model: Any, *__: Any) -> list[TaskScore]:
            for _pass in range(5):
                model(torch.zeros(1))
            return [TaskScore("quiz", f"m{number}", 2, 0.5, 0, None, 0.5) for number in range(scores)]

        monkeypatch.setattr("connito.workloads.benchmarks.compare", asked)
        named = {
            "benchmarks": [
                CorpusRef(domain=f"exam{number}", artifact=ArtifactRef(digest="e")) for number in range(exams)
            ],
            "tasks": [CorpusRef(domain=f"quiz{number}", artifact=ArtifactRef(digest="d")) for number in range(tasks)],
        }
        spec = RunSpec(run="r", **cast(Any, named))
        return measure(evaluator, None, spec, {"d": file, "e": exam}, "s", state, between)

    return run


def test_between_every_two_batches_and_passes_others_may_go_first(whole: Any) -> None:
    calls: list[int] = []
    found = whole(lambda: calls.append(1))
    # Each entry once, three batches for each of base and result, and each pass of the model.
    assert len(calls) == 2 + 6 + 5
    assert (len(found.scores), len(found.unscored)) == (2, 0)
    found = whole(lambda: calls.append(1))
    assert len(calls) == 2 * (2 + 6 + 5), "nothing is left hanging on the model"


@pytest.mark.parametrize(("after", "missing"), [(0, ["exam0", "quiz0"]), (3, ["exam0", "quiz0"]), (10, ["quiz0"])])
def test_what_is_not_scored_in_time_is_named(whole: Any, after: int, missing: list[str]) -> None:
    calls: list[int] = []

    def between() -> None:
        calls.append(1)
        if len(calls) > after:
            raise Invalid("it was not scored within 1.5 hours of the run's end")

    found = whole(between)
    assert [entry.name for entry in found.unscored] == missing
    assert {entry.why for entry in found.unscored} == {"it was not scored within 1.5 hours of the run's end"}


def test_scores_that_a_record_has_no_room_for_are_named(whole: Any) -> None:
    found = whole(lambda: None, exams=16, tasks=16, scores=8)
    assert len(found.scores) == 16 + 13 * 8
    assert [entry.name for entry in found.unscored] == ["quiz13", "quiz14", "quiz15"]
    assert "at most 120 scores: the delivery report has the others" in found.unscored[0].why

"""Tasks of the harness in a job: fixed when it is checked, apart from its text, scored as the harness scores the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from connito.base.loading import load_full, load_tokenizer
from connito.errors import Invalid, NotFound
from connito.experts.harness import run
from connito.experts.tasks import Task, compare, read_task
from connito.jobs.check import check
from connito.jobs.pages import markdown
from connito.jobs.spec import parse_job

pytestmark = pytest.mark.slow

ITEMS = [
    {"q": "The capital of France is", "wrong": ["Rome ", "Oslo", "Wien ü"], "right": "Paris"},
    {"q": "Water boils at\n", "wrong": ["ninety", "ten", "no"], "right": "a hundred"},
    {"q": "{{ not a template }} is", "wrong": ["a", "b", "c"], "right": "{{ d }}"},
]
CHOICES = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: 1
fewshot_config: {sampler: first_n}
description: "Answer.\\n"
doc_to_text: "Q: {{q}}\\nA:"
doc_to_choice: "{{wrong + [right]}}"
doc_to_target: 3
metric_list: [{metric: acc}, {metric: acc_norm, aggregation: mean, higher_is_better: true}]
"""
ANSWERS = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{right}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 8}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
"""


def task_file(folder: Path, text: str, items: list[dict[str, Any]] = ITEMS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "task.yaml").write_text(text)
    return folder / "task.yaml"


@pytest.mark.parametrize("text", [CHOICES, ANSWERS], ids=["choices", "answers"])
def test_a_fixed_task_is_scored_item_by_item_as_the_harness_scores_its_file(
    customer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    file = task_file(tmp_path / "a task", text)
    model, words = load_full(customer / "base"), load_tokenizer(customer / "base")
    task = Task.decode(read_task(file, "mine").encode())
    (fixed := tmp_path / "fixed").mkdir()
    ours = run(model, words, [task.write(fixed)])
    # The harness takes paths in a task from where it runs; a job takes them from beside the task.
    monkeypatch.chdir(file.parent)
    theirs = run(model, words, [file])
    names = [set(row["metrics"]) for row in next(iter(theirs.values()))]
    assert names[0]

    def scores(samples: Any) -> list[list[float]]:
        return [[row[name] for name in sorted(names[0])] for rows in samples.values() for row in rows]

    assert scores(ours) == scores(theirs)
    # What was put to the model, and with it how likely each choice was, is the same too.
    assert [row["filtered_resps"] for rows in ours.values() for row in rows] == [
        row["filtered_resps"] for rows in theirs.values() for row in rows
    ]


def test_base_and_result_are_compared_item_by_item(
    customer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import torch

    words = load_tokenizer(customer / "base")
    model: Any = load_full(customer / "base")
    task = read_task(task_file(tmp_path / "t", CHOICES), "mine")

    def put() -> None:
        with torch.no_grad():
            model.lm_head.weight.add_(
                torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
            )

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", kept := tmp_path / "kept")
    rows = compare([task], model, words, put)
    assert not list(kept.rglob("*")), "where it is scored, a task is somebody's hold-out"
    assert {(row.task, row.metric, row.items) for row in rows} == {("mine", "acc", 3), ("mine", "acc_norm", 3)}
    for row in rows:
        assert row.base is not None
        assert row.interval is not None
        assert row.interval[0] <= row.score - row.base <= row.interval[1]


FUNCTION = CHOICES.replace('doc_to_text: "Q: {{q}}\\nA:"', "doc_to_text: !function said.ask")


@pytest.mark.parametrize(
    ("text", "items", "why"),
    [
        ("task: x\n", ITEMS, "a task cannot be run"),
        ("dataset_path: json\n", ITEMS, "names no task"),
        (CHOICES.replace("items.jsonl", "none.jsonl"), ITEMS, "a task cannot be run"),
        (CHOICES.replace("doc_to_target: 3", "doc_to_target: 9"), ITEMS, "a task cannot be run"),
        (CHOICES.replace("{{q}}", "{{no_such_field}}"), ITEMS, "a task cannot be run"),
        (CHOICES.replace("shot: 1", "shot: 0"), ITEMS[:1], "an interval takes two"),
        (CHOICES.replace("multiple_choice", "loglikelihood_rolling"), ITEMS, "run others with `connito evaluate`"),
        (FUNCTION, ITEMS, "a task cannot be run"),
        (CHOICES.replace("dataset_path: json", "dataset_path: someone/set"), ITEMS, "a task cannot be run"),
        ("task: x\n\t- [", ITEMS, "a task cannot be run"),
    ],
)
def test_what_is_no_task_of_a_job_is_one_sentence(tmp_path: Path, text: str, items: Any, why: str) -> None:
    with pytest.raises(Invalid, match=why) as found:
        read_task(task_file(tmp_path / "t", text, items), "mine")
    assert "\n" not in str(found.value)


def test_functions_of_a_task_file_run_where_it_is_read_alone(tmp_path: Path) -> None:
    file = task_file(tmp_path / "t", FUNCTION)
    (file.parent / "said.py").write_text("def ask(doc):\n    return doc['q'].upper()\n")
    task = read_task(file, "mine")
    assert "WATER BOILS" in str(task.items[1]["given"])
    assert b"said" not in task.encode()
    with pytest.raises(NotFound, match="no task file"):
        read_task(tmp_path / "none.yaml", "mine")


def job(**fields: Any) -> dict[str, Any]:
    return {
        "domain": "code", "base": "base", "data": [{"path": "code.jsonl"}], "license": "PSF-2.0",
        "policies": {"training": {"sequence_length": 64, "local_steps": 4}},
        "general": [{"domain": "prose", "path": "prose.jsonl"}], **fields,
    }  # fmt: skip


def test_items_that_the_training_text_holds_are_found_and_the_text_is_dropped(customer: Path) -> None:
    seen = json.loads((customer / "code.jsonl").read_text().splitlines()[0])["text"]
    items = [{**ITEMS[0], "q": f"What does this do?\n{seen}"}, *ITEMS[1:]]
    file = task_file(customer / "seen", CHOICES, items)
    asked = [{"name": "quiz", "task": str(file.relative_to(customer))}]

    def found(**more: Any) -> Any:
        return check(parse_job(job(benchmarks=asked, **more)), customer, customer / "no-platform")

    refused = found()
    row = next(row for row in refused.findings if row.check == "contamination" and "quiz" in row.detail)
    assert (row.level, row.numbers["found"], row.numbers["dropped"]) == (
        "error",
        3,
        1,
    )  # All three have it as an example.
    dropped = found(contamination="drop")
    assert dropped.ok, [row for row in dropped.findings if row.level == "error"]
    assert seen not in [document.text for document in (*dropped.texts.train, *dropped.texts.probe)]
    assert [len(task.items) for task in dropped.texts.tasks] == [3]
    again = dropped.texts.tasks[0].seen_in(document.text for document in dropped.texts.train)
    assert again == []


def test_a_benchmark_is_a_text_or_a_task() -> None:
    for entry, why in (
        ({"name": "a"}, "give either `path`"),
        ({"name": "a", "path": "x", "task": "y"}, "give either `path`"),
        ({"name": "a", "task": "y", "weight": 2}, "leave the other fields out"),
    ):
        with pytest.raises(Invalid, match=why):
            parse_job(job(benchmarks=[entry]))


def test_the_report_has_a_row_a_metric_or_says_why_not() -> None:
    row = {"task": "quiz", "metric": "acc", "items": 40, "base": 0.25, "score": 0.5, "interval": [0.1, 0.4]}
    measured = {"confidence": 0.95, "rows": [], "apart": None, "right": [], "tasks": [row]}
    document: dict[str, Any] = {
        "domain": "code", "run": "r", "base": {"name": "b", "manifest": "m"}, "outcome": {"status": "completed", "detail": "d"},
        "expert": None, "shelf": "", "measured": measured, "selection": None, "cycles": [], "contributors": [],
        "commands": {"audit": "connito audit r"},
    }  # fmt: skip
    assert "| quiz | acc | 25.0 % | 50.0 % | +25.0 | +10.0 to +40.0 | 40 |" in markdown(document)
    measured |= {"tasks": [], "tasks_missing": "lm_eval is not installed"}
    assert "were not measured: lm_eval is not installed." in markdown(document)

"""Tasks of lm-evaluation-harness among a job's benchmarks, fixed before the run.

A task file is read once, on the customer's machine, when the job is checked: questions, choices and answers as the harness puts
them to a model. These travel with the run, sealed like every hold-out, so that what is reported is what was named before anything
was trained, and no code of a task file runs later or elsewhere.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from connito.data.documents import parse_json
from connito.errors import Invalid
from connito.experts.harness import TaskScore, harness, is_seen, ngrams, run, score, task_name
from connito.files import plain_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# Items of a task that are kept; the first ones, so that the figure is the same again.
MOST_ITEMS = 500
CHOICE, ANSWER = "multiple_choice", "generate_until"


@dataclass(frozen=True)
class Task:
    """A task as a model meets it. kind: `multiple_choice` (`choices`, and the place of the right one) or `generate_until` (an
    answer, drawn and filtered as `how` says, in the harness's own words).
    """

    name: str
    kind: str
    items: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    how: Mapping[str, Any]

    def encode(self) -> bytes:
        """Return the task as it is stored."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> Task:
        """Read a stored task. Raises `Invalid` for anything else: who writes a run's spec by hand may name any file."""
        try:
            task = cls(**parse_json(data))
            if plain_name(task.name) and task.kind in (CHOICE, ANSWER):
                return task
        except (TypeError, ValueError):
            pass
        raise Invalid("what the run names as a task is none: submit tasks in a job.yaml, under `benchmarks`")

    def texts(self) -> Iterator[str]:
        """Yield each item with its right answer, as text."""
        for item in self.items:
            right = item["choices"][item["answer"]] if self.kind == CHOICE else item["answer"]
            yield f"{item['given']} {right}"

    def held_by(self, texts: Iterable[str]) -> set[int]:
        """Return the places of the texts that hold thirteen words in a row of an item."""
        asked = ngrams(self.texts())
        return {place for place, text in enumerate(texts) if asked and is_seen(text, asked)}

    def seen_in(self, texts: Iterable[str]) -> list[int]:
        """Return the places of the items of which the texts hold thirteen words in a row."""
        asked = ngrams(self.texts())
        # Of the texts, which may be large, only what matters is kept.
        seen = frozenset(run for text in texts for run in ngrams([text]) & asked) if asked else frozenset()
        return [place for place, text in enumerate(self.texts()) if seen and is_seen(text, seen)]

    def write(self, folder: Path) -> Path:
        """Write the task as files of the harness; returns the one that it is run by."""
        data, file = folder / f"{self.name}.jsonl", folder / f"{self.name}.yaml"
        data.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in self.items))
        file.write_text(yaml.safe_dump({
            "task": self.name, "dataset_path": "json", "dataset_kwargs": {
                # What it makes of the items ends with this folder: on this machine they are somebody's hold-out.
                "data_files": {"test": str(data)}, "cache_dir": str(folder / "cache"),
            },
            "output_type": self.kind, "test_split": "test", "doc_to_text": "given", "doc_to_target": "answer",
            "metric_list": [dict(metric) for metric in self.metrics], "metadata": {"version": 1.0},
            **({"doc_to_choice": "choices"} if self.kind == CHOICE else {}), **self.how,
        }, sort_keys=False))  # fmt: skip
        return file


def read_task(file: Path, name: str) -> Task:
    """Read a task file and its data; relative paths are beside it. Raises `NotFound`, and `Invalid` for what the harness refuses
    or what cannot be fixed beforehand."""
    task_name(file)
    with harness():
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._yaml_loader import load_yaml

        config = load_yaml(file)
        config["dataset_kwargs"] = _beside(file.parent, config.get("dataset_kwargs") or {})
        task: Any = ConfigurableTask(config=config)
        kind = str(task.OUTPUT_TYPE)
        if kind not in (CHOICE, ANSWER) or task.config.process_results is not None:
            raise Invalid(
                f"{file} asks for {kind}{' with a function of its own' if kind in (CHOICE, ANSWER) else ''}: in a job a task is "
                f"{CHOICE} or {ANSWER} and scored by the harness's metrics; run others with `connito evaluate`"
            )
        metrics = [_plain(file, metric) for metric in task.config.metric_list or _default_metrics(kind)]
        items = [_item(file, task, kind, doc) for doc in islice(task.eval_docs, MOST_ITEMS)]
        how: dict[str, Any] = {"target_delimiter": task.config.target_delimiter}
        if kind == ANSWER:
            how = {"generation_kwargs": task.config.generation_kwargs}
            if task.config.filter_list:
                how["filter_list"] = _plain(file, task.config.filter_list)
    if len(items) < 2:
        raise Invalid(f"{file} has {len(items)} items, and an interval takes two: give it more")
    return Task(name, kind, items, metrics, how)


def _beside(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a data set with relative files taken from beside the task."""

    def at(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: at(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [at(entry) for entry in value]
        return str(folder / value) if isinstance(value, str) and "://" not in value else value

    return {key: at(value) if key in ("data_files", "data_dir") else value for key, value in given.items()}


def _default_metrics(kind: str) -> list[dict[str, Any]]:
    names = ("acc", "acc_norm") if kind == CHOICE else ("exact_match",)
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _plain(file: Path, value: Any) -> Any:
    """Return plain data, as it can be kept. Raises `Invalid` for functions in it."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise Invalid(
            f"{file} has a function where a job takes names of the harness's metrics and filters; run it with `connito evaluate`"
        ) from error


def _item(file: Path, task: Any, kind: str, doc: Any) -> dict[str, Any]:
    given, answer = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot or 0), task.doc_to_target(doc)
    if kind == ANSWER:
        return {"given": given, "answer": _plain(file, answer)}
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    place = choices.index(answer) if isinstance(answer, str) and answer in choices else answer
    if not isinstance(given, str) or type(place) is not int or not 0 <= place < len(choices):
        raise Invalid(f"{file}: an item has no one right answer among its choices (answer: {str(answer)[:80]!r})")
    return {"given": given, "choices": choices, "answer": place}


def compare(tasks: Sequence[Task], model: Any, tokenizer: Any, put: Callable[[], None]) -> list[TaskScore]:
    """Return every metric of the tasks, for the model as it is and after `put` has changed it. Raises `Invalid`."""
    with tempfile.TemporaryDirectory() as folder:
        with harness():
            files = [task.write(Path(folder)) for task in tasks]
        before = run(model, tokenizer, files)
        put()
        after = run(model, tokenizer, files)
    return [row for name in after for row in score(name, after[name], before[name], frozenset())]

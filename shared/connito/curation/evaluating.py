"""`connito evaluate`: tasks for a base, an expert in it, or an exported model, through lm-evaluation-harness, without a network.

Tasks are local files in the harness's own format. Where there are none, cloze tasks are made of held-out text: the true
continuation of a passage among three of other passages (in the manner of HellaSwag, without adversarial filtering, so they
are easier). What shares thirteen words in a row with the training text (Brown et al. 2020, appendix C) is counted apart.
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from connito.base.loading import load_full, load_tokenizer
from connito.curation.holdings import Agreement, Holdings
from connito.data.reading.texts import read_texts
from connito.errors import Invalid, NotFound
from connito.experts.load import load_expert
from connito.library.artifact import EXPERT_FILE
from connito.library.interval import change_interval
from connito.moe.device import device_of

NGRAM = 13
_WORD = re.compile(r"\w+")
# Words of a passage that are given, and that are continued.
GIVEN, CONTINUED, CHOICES = 40, 15, 4


@dataclass(frozen=True)
class EvaluateOptions:
    """Tasks and how much of them. tasks: the harness's YAML files; cloze: held-out text by name; against: the training text;
    limit: items of a task, 0 for all."""

    tasks: Sequence[Path] = ()
    cloze: Mapping[str, Path] = field(default_factory=dict)
    against: Sequence[Path] = ()
    limit: int = 0
    agreement: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: over all items, and over those that the training text does not contain.

    base: the base's score where an expert was judged; interval: of the difference, paired by item, 95 %.
    """

    task: str
    metric: str
    items: int
    score: float
    contaminated: int
    clean_score: float | None
    base: float | None = None
    interval: tuple[float, float] | None = None


Samples = dict[str, list[dict[str, Any]]]


def evaluate(
    target: str | Path,
    base: Path | None = None,
    options: EvaluateOptions | None = None,
    library: Holdings | None = None,
) -> list[TaskScore]:
    """Score an exported model (a folder), or an expert in its `base`, beside the base alone. Raises `Invalid`, `NotFound`."""
    options, library = options or EvaluateOptions(), library or Holdings()
    if not options.tasks and not options.cloze:
        raise Invalid("there is nothing to evaluate on: give --tasks FILE.yaml, or --cloze NAME=TEXT")
    folder = Path(target)
    whole = folder.is_dir() and (folder / "config.json").is_file() and not (folder / EXPERT_FILE).is_file()
    if not whole and base is None:
        raise Invalid(f"{target} is an expert or none: add --base FOLDER")
    seen = ngrams(read_texts(options.against)) if options.against else frozenset()
    with tempfile.TemporaryDirectory() as scratch:
        files = [*options.tasks, *(_cloze(name, path, Path(scratch)) for name, path in options.cloze.items())]
        if whole:
            found, before = _run(load_full(folder, device=device_of()), folder, files, options.limit), None
        else:
            assert base is not None
            expert = library.find(str(target))
            library.permit([expert], "evaluate", options.agreement)
            model = load_full(base, device=device_of())
            before = _run(model, base, files, options.limit)
            load_expert(model, expert[0])
            found = _run(model, base, files, options.limit)
            library.meter([expert[1]], "evaluate")
    return [score for name in found for score in _scores(name, found[name], (before or {}).get(name), seen)]


def write_scores(scores: Sequence[TaskScore], target: str, out: Path) -> None:
    """Write the scores as one JSON document."""
    out.write_text(json.dumps({"target": target, "scores": [asdict(score) for score in scores]}, indent=1) + "\n")


def ngrams(texts: Iterable[str]) -> frozenset[int]:
    """Return hashes of every run of `NGRAM` words."""
    return frozenset(entry for text in texts for entry in _runs(text))


def _runs(text: str) -> Iterator[int]:
    words = _WORD.findall(text.lower())
    return (hash(tuple(words[i : i + NGRAM])) for i in range(len(words) - NGRAM + 1))


def _run(model: Any, folder: Path, files: Sequence[Path], limit: int) -> Samples:
    """Return every item's metrics by task, in the items' order."""
    try:
        with _offline():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Invalid(f"{error.name} is not installed; `pip install 'connito[model,evaluate]'` brings it") from error
    with _offline():
        manager = TaskManager(include_path=sorted({str(file.parent) for file in files}), include_defaults=False)
        names = [_task(file) for file in files]
        wrapped = HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=8)
        try:
            done: Any = simple_evaluate(
                wrapped, tasks=names, task_manager=manager, limit=limit or None,
                bootstrap_iters=0, log_samples=True,
            )  # fmt: skip
        except Exception as error:
            # A task file is half a program: whatever it stumbles over is for its author to know.
            why = next(iter(str(error).splitlines()), "")[:300]
            raise Invalid(
                f"a task cannot be run ({type(error).__name__} {why}): look at its file and its data"
            ) from error
    return {name: sorted(rows, key=lambda row: int(row["doc_id"])) for name, rows in done["samples"].items()}


def _task(file: Path) -> str:
    if not file.is_file():
        raise NotFound(f"there is no task file {file}; write one as lm-evaluation-harness reads it")
    try:
        # What the harness adds to YAML (`!function`) is its own to read.
        found = re.search(r"^task:\s*(\S+)\s*$", file.read_text(), re.M)
    except UnicodeDecodeError as error:
        raise Invalid(f"{file} is not a text file") from error
    if found is None:
        raise Invalid(f"{file} names no task: it needs a line `task: NAME`")
    return found[1].strip("'\"")


def _scores(
    name: str, rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]] | None, seen: frozenset[int]
) -> list[TaskScore]:
    known = [bool(seen) and any(run in seen for run in _runs(_words(row["doc"]))) for row in rows]
    scores = []
    for metric in rows[0]["metrics"] if rows else []:
        if not all(isinstance(row[metric], int | float) for row in rows):
            continue
        values = [float(row[metric]) for row in rows]
        clean = [value for value, bad in zip(values, known, strict=True) if not bad]
        old = None if before is None else [float(row[metric]) for row in before]
        mean = sum(values) / len(values)
        scores.append(TaskScore(
            name, metric, len(values), mean, sum(known), sum(clean) / len(clean) if clean else None,
            None if old is None else sum(old) / len(old),
            None if old is None else change_interval(old, values, [1] * len(values)),
        ))  # fmt: skip
    return scores


def _words(document: Any) -> str:
    if isinstance(document, Mapping):
        return " ".join(_words(value) for value in document.values())
    return " ".join(map(_words, document)) if isinstance(document, list) else str(document)


def _cloze(name: str, path: Path, scratch: Path) -> Path:
    """Write a cloze task of a held-out text; returns its file. The same text gives the same items."""
    if not re.fullmatch(r"[\w-]+", name):
        raise Invalid(f"{name!r} is no name of a task: use letters, digits, - and _")
    passages = [
        words[i : i + GIVEN + CONTINUED]
        for text in read_texts([path])
        for words in [text.split()]
        for i in range(0, len(words) - GIVEN - CONTINUED + 1, GIVEN + CONTINUED)
    ]
    if len(passages) < 2 * CHOICES:
        raise Invalid(
            f"{path} has {len(passages)} passages of {GIVEN + CONTINUED} words, too few for a task: give more text"
        )
    draw, items = random.Random(f"connito.cloze:{name}"), []
    for number, passage in enumerate(passages):
        others = draw.sample([other for at, other in enumerate(passages) if at != number], CHOICES - 1)
        choices = [" ".join(words[GIVEN:]) for words in (passage, *others)]
        order = draw.sample(range(CHOICES), CHOICES)
        items.append(
            {"given": " ".join(passage[:GIVEN]), "choices": [choices[i] for i in order], "answer": order.index(0)}
        )
    data, task = scratch / f"{name}.jsonl", scratch / f"{name}.yaml"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    task.write_text(yaml.safe_dump({
        "task": f"cloze_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{given}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")],
        "metadata": {"version": 1.0},
    }, sort_keys=False))  # fmt: skip
    return task


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the harness and what it reads data with from looking for anything on a hub."""
    names = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

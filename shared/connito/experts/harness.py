"""lm-evaluation-harness on a model in memory, without a network: local task files, the score of each item, and what was seen.

What shares thirteen words in a row with a training text (Brown et al. 2020, appendix C) counts as seen in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connito.errors import Invalid, NotFound
from connito.library.interval import change_interval
from connito.runtime.extras import sentence
from connito.runtime.progress import tell

NGRAM = 13
_WORD = re.compile(r"\w+")
Samples = dict[str, list[dict[str, Any]]]


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


def ngrams(texts: Iterable[str]) -> frozenset[int]:
    """Return hashes of every run of `NGRAM` words."""
    return frozenset(entry for text in texts for entry in _runs(text))


def is_seen(item: object, seen: frozenset[int]) -> bool:
    """Return whether a run of words of an item is among those of the training text."""
    return any(run in seen for run in _runs(_words(item)))


def _runs(text: str) -> Iterator[int]:
    words = _WORD.findall(text.lower())
    return (hash(tuple(words[i : i + NGRAM])) for i in range(len(words) - NGRAM + 1))


def run(model: Any, tokenizer: Any, files: Sequence[Path], limit: int = 0) -> Samples:
    """Return every item's metrics by task, in the items' order."""
    tell(f"asking {', '.join(file.stem for file in files)}")
    with harness():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=sorted({str(file.parent) for file in files}), include_defaults=False)
        names = [task_name(file) for file in files]
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        done: Any = simple_evaluate(
            wrapped, tasks=names, task_manager=manager, limit=limit or None, bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
    return {name: rows for task, samples in done["samples"].items() for name, rows in _by_filter(task, samples)}


def _by_filter(task: str, samples: Iterable[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the items as each filter of a task's answers saw them: one filter is the task itself."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(samples, key=lambda row: int(row["doc_id"])):
        found.setdefault(str(row.get("filter", "")), []).append(row)
    for name, rows in found.items():
        yield (task if len(found) == 1 else f"{task}, {name}"), rows


def task_name(file: Path) -> str:
    """Return the name of the task in a file. Raises `NotFound` and `Invalid`."""
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


def score(
    name: str, rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]] | None, seen: frozenset[int]
) -> list[TaskScore]:
    """Return each metric of one task over its items; `before`: the base's items, `seen`: `ngrams` of the training text."""
    known = [bool(seen) and is_seen(row["doc"], seen) for row in rows]
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


@contextmanager
def harness() -> Iterator[None]:
    """Keep the harness, and what it reads data with, from looking for anything on a hub; whatever a task stumbles over becomes
    one sentence: a task file is half a program, and its author has to know. Raises `Invalid`."""
    names = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    kept = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    except (Invalid, NotFound):
        raise
    except ImportError as error:
        raise Invalid(sentence(error) or f"a task cannot be run: {error}") from error
    except Exception as error:
        why = next(iter(str(error).splitlines()), "")[:300]
        raise Invalid(f"a task cannot be run ({type(error).__name__} {why}): look at its file and its data") from error
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

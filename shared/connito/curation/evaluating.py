"""`connito evaluate`: tasks for a base, an expert in it, or an exported model, through lm-evaluation-harness.

Tasks are local files in the harness's own format. Where there are none, cloze tasks are made of held-out text: the true
continuation of a passage among three of other passages (in the manner of HellaSwag, without adversarial filtering, so they
are easier). What the training text holds too is counted apart.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from connito.base.loading import load_full, load_tokenizer
from connito.curation.holdings import Agreement, Holdings
from connito.data.reading.texts import read_texts
from connito.errors import Invalid
from connito.experts.harness import TaskScore, ngrams, run
from connito.experts.harness import score as rated
from connito.experts.load import load_expert
from connito.library.artifact import EXPERT_FILE
from connito.moe.device import device_of
from connito.render import formats

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
            found, before = (
                run(load_full(folder, device=device_of()), load_tokenizer(folder), files, options.limit),
                None,
            )
        else:
            assert base is not None
            expert = library.find(str(target))
            library.permit([expert], "evaluate", options.agreement)
            model = load_full(base, device=device_of())
            words = load_tokenizer(base)
            before = run(model, words, files, options.limit)
            load_expert(model, expert[0])
            found = run(model, words, files, options.limit)
            library.meter([expert[1]], "evaluate")
    return [score for name in found for score in rated(name, found[name], (before or {}).get(name), seen)]


def write_scores(scores: Sequence[TaskScore], target: str, out: Path) -> None:
    """Write the scores as one JSON document."""
    out.write_text(json.dumps({"target": target, "scores": [asdict(score) for score in scores]}, indent=1) + "\n")


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
            f"{path} has {formats.count(len(passages), 'passage')} of "
            f"{GIVEN + CONTINUED} words, too few for a task: give more text"
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

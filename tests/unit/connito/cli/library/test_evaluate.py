"""`connito evaluate` through lm-evaluation-harness: local tasks, generated ones, and items that were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from connito.base.tiny import tiny_texts
from connito.curation.evaluating import EvaluateOptions, evaluate, write_scores
from connito.curation.holdings import Holdings
from connito.errors import Invalid, NotFound
from connito.library.shelf import Shelf

pytestmark = pytest.mark.slow


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "recipes.txt"
    path.write_text("\n".join(tiny_texts("recipes", 77, 30)))
    return path


def capital_task(folder: Path, items: list[dict[str, Any]]) -> Path:
    """A task that asks whether a line goes on in small letters or in Greek."""
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    file = folder / "goes_on.yaml"
    file.write_text(f"""
task: goes_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "items.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{given}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
""")
    return file


def test_an_expert_is_scored_beside_its_base_and_seen_items_apart(
    stocked: Any, tiny: Path, tmp_path: Path, held_out: Path
) -> None:
    shelf, ids = stocked
    seen = "simmer the leek until soft then add the barley and whisk the quince with butter"
    items = [
        {"given": f"{seen} ", "choices": ["and thyme", "νύξ λάμπει"], "answer": 0},
        {"given": "roast the trout until soft, then ", "choices": ["ποταμός", "add the leek"], "answer": 1},
        {"given": "cups of ", "choices": ["Σιγή ἀεὶ", "walnut"], "answer": 0},
    ]
    training = tmp_path / "training.txt"
    training.write_text(f"before it. {seen.upper()}, after it")
    options = EvaluateOptions([capital_task(tmp_path, items)], {"recipes": held_out}, [training])
    scores = {(s.task, s.metric): s for s in evaluate(ids["recipes"], tiny, options, Holdings(shelf))}
    ours = scores["goes_on", "acc"]
    # The last item's answer is wrong on purpose: a model that knows its letters gets two of three.
    assert (ours.items, ours.contaminated) == (3, 1)
    assert ours.score == pytest.approx(2 / 3)
    assert ours.clean_score == pytest.approx(1 / 2)
    cloze = scores["cloze_recipes", "acc"]
    assert cloze.items > 20
    assert cloze.base is not None
    assert cloze.interval is not None
    assert cloze.interval[0] <= cloze.score - cloze.base <= cloze.interval[1]
    with Shelf(shelf).index() as index:
        assert index.usage(ids["recipes"]) == {"evaluate": 1}
    write_scores([ours], "recipes", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["scores"][0]["contaminated"] == 1


def test_what_cannot_be_evaluated_is_one_sentence(stocked: Any, tiny: Path, tmp_path: Path, held_out: Path) -> None:
    shelf, ids = stocked
    library = Holdings(shelf)
    broken = tmp_path / "broken.yaml"
    broken.write_text("dataset_path: json\n")
    missing = capital_task(tmp_path, [])
    few = tmp_path / "few.txt"
    few.write_text("too little")
    with pytest.raises(Invalid, match="nothing to evaluate on"):
        evaluate(ids["logs"], tiny, EvaluateOptions(), library)
    with pytest.raises(Invalid, match="add --base"):
        evaluate(ids["logs"], None, EvaluateOptions(cloze={"a": held_out}), library)
    with pytest.raises(NotFound, match="no task file"):
        evaluate(ids["logs"], tiny, EvaluateOptions([tmp_path / "none.yaml"]), library)
    with pytest.raises(Invalid, match="names no task"):
        evaluate(ids["logs"], tiny, EvaluateOptions([broken]), library)
    with pytest.raises(Invalid, match="cannot be run"):
        evaluate(ids["logs"], tiny, EvaluateOptions([missing]), library)
    with pytest.raises(Invalid, match="too few for a task"):
        evaluate(ids["logs"], tiny, EvaluateOptions(cloze={"a": few}), library)
    with pytest.raises(Invalid, match="no name of a task"):
        evaluate(ids["logs"], tiny, EvaluateOptions(cloze={"a/b": held_out}), library)

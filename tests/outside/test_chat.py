"""Chat data as people publish it, from the file to what is learned, beside transformers' own rendering and loss."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.base.loading import load_tokenizer
from connito.data.corpus import Corpus
from connito.jobs.check import Checked, check
from connito.jobs.spec import parse_job

from tests.support.chat import CHATML, MODEL_TURNS, marked, plain

pytestmark = pytest.mark.slow
WORDS = [f"w{number:x}" for number in range(4000)]
POLICIES = {
    "training": {"sequence_length": 128, "local_steps": 2},
    "scoring": {"target_sequences": 4, "general_sequences": 2},
    "merging": {
        "gate_target_sequences": 4, "gate_general_sequences": 2, "report_target_sequences": 4, "report_general_sequences": 2,
    },
}  # fmt: skip


def said(seed: int, count: int = 12) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def conversation(seed: int) -> list[dict[str, str]]:
    turns = 1 + seed % 3
    return [
        {"role": role, "content": said(100 * seed + 2 * turn + (role == "assistant"))}
        for turn in range(turns)
        for role in ("user", "assistant")
    ]


@pytest.fixture(scope="module")
def customer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that has a chat template in a file of its own, and general text."""
    from tests.support.models import save_random

    folder = tmp_path_factory.mktemp("customer")
    base = save_random(
        folder / "base", hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_experts=4, shared_expert_intermediate_size=8, mlp_only_layers=[],
    )  # fmt: skip
    (base / "chat_template.jinja").write_text(plain(CHATML))
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": said(-n - 1, 60)}) + "\n" for n in range(60)))
    return folder


def write(customer: Path, rows: list[Any]) -> str:
    name = f"chat-{len(list(customer.iterdir()))}.jsonl"
    (customer / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def run(customer: Path, rows: list[Any], **fields: Any) -> Checked:
    job = {
        "domain": "chat", "base": "base", "data": [{"path": write(customer, rows)}], "license": "CC0-1.0",
        "policies": POLICIES, "general": [{"domain": "prose", "path": "prose.jsonl"}], "data_statement": "Words.", **fields,
    }  # fmt: skip
    return check(parse_job(job), customer, customer / "no-platform")


def documents(corpus: Corpus) -> set[tuple[tuple[int, ...], tuple[bool, ...]]]:
    loss = np.ones(len(corpus.tokens), bool) if corpus.loss is None else corpus.loss
    bounds = zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    return {(tuple(corpus.tokens[a:b].tolist()), tuple(loss[a:b].tolist())) for a, b in bounds}


def by_transformers(customer: Path, messages: list[dict[str, str]]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    tokenizer = load_tokenizer(customer / "base")
    out = tokenizer.apply_chat_template(
        messages, chat_template=marked(CHATML), return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marks = list(out["input_ids"]), [bool(mark) for mark in out["assistant_masks"]]
    # The byte tokenizer has no token for the end of a turn: an end of text says that the last one is over.
    return (*ids, tokenizer.eos_token_id), (*marks, True)


def test_conversations_are_learned_as_transformers_marks_them(customer: Path) -> None:
    talks = [conversation(seed) for seed in range(120)]
    checked = run(customer, [{"messages": talk} for talk in talks])
    assert checked.ok, [row for row in checked.findings if row.level == "error"]
    assert checked.corpora is not None
    want = {by_transformers(customer, talk) for talk in talks}
    parts = [documents(corpus) for corpus in (checked.corpora.train, checked.corpora.probe, checked.corpora.holdout)]
    assert set().union(*parts) == want
    assert sum(map(len, parts)) == len(want)
    (found,) = [row for row in checked.findings if row.check == "chat"]
    assert found.level == "ok"
    assert found.detail.startswith("120 conversations by the base's chat template")


def shapes(talk: list[dict[str, str]]) -> list[dict[str, Any]]:
    asked, answered = talk[0]["content"], talk[1]["content"]
    return [
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]},
        {"prompt": asked, "completion": answered},
        {"prompt": talk[:1], "completion": talk[1:2]},
        {"instruction": asked, "input": "", "output": answered},
        {"query": asked, "response": answered},
        {"question": asked, "answer": answered},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": asked}]}, talk[1]]},
    ]


def test_every_shape_gives_the_same_documents(customer: Path) -> None:
    talks = [conversation(3 * seed) for seed in range(70)]
    rows = [shapes(talk)[number % 7] for number, talk in enumerate(talks)]
    checked = run(customer, rows)
    assert checked.corpora is not None
    found = documents(checked.corpora.train) | documents(checked.corpora.probe) | documents(checked.corpora.holdout)
    assert found == {by_transformers(customer, talk[:2]) for talk in talks}


def test_what_a_template_refuses_is_left_out_and_counted(customer: Path) -> None:
    (customer / "model.jinja").write_text(plain(MODEL_TURNS))
    system = {"role": "system", "content": "Be short."}
    talks = [{"messages": [*([system] if seed % 4 == 0 else []), *conversation(seed)]} for seed in range(120)]
    broken: list[Any] = [{"messages": [{"role": "wizard", "content": said(1)}]}, {"messages": [conversation(5)[0]]}]
    checked = run(customer, [*talks, *broken], chat_template="model.jinja")
    (found,) = [row for row in checked.findings if row.check == "chat"]
    assert found.level == "warning"
    assert "90 conversations by the job's template" in found.detail
    assert "30 left out: the template refuses them: there is no system here (30)" in found.detail
    (reach,) = [row for row in checked.findings if row.check == "reach" and row.detail.startswith("data")]
    assert "1 rows with a message of the unknown role 'wizard'" in reach.detail
    assert "1 rows with no answer of an assistant" in reach.detail


def test_without_a_template_it_says_that_conversations_are_in_plain_words(customer: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(customer, tmp_path / "copy")
    (tmp_path / "copy/base/chat_template.jinja").unlink()
    checked = run(tmp_path / "copy", [{"messages": conversation(seed)} for seed in range(120)])
    (found,) = [row for row in checked.findings if row.check == "chat"]
    assert (found.level, found.detail.split(",")[0]) == ("warning", "120 conversations by plain words")
    assert "chat_template" in found.remedy


def test_conversations_and_texts_go_together(customer: Path) -> None:
    texts = write(customer, [{"text": said(9000 + n, 40)} for n in range(60)])
    chats = write(customer, [{"messages": conversation(seed)} for seed in range(60)])
    checked = run(customer, [], data=[{"path": texts}, {"path": chats}])
    assert checked.corpora is not None
    train = checked.corpora.train
    whole = [all(marks) for _, marks in documents(train)]
    assert any(whole)
    assert not all(whole)


def test_a_text_with_an_end_of_text_forges_no_document(customer: Path) -> None:
    rows = [{"text": f"{said(n, 20)}<|endoftext|>{said(-n - 500, 20)}"} for n in range(80)]
    checked = run(customer, rows)
    assert checked.corpora is not None
    for corpus in (checked.corpora.train, checked.corpora.probe, checked.corpora.holdout):
        assert (corpus.tokens == 256).sum() == corpus.documents


def test_a_template_may_stand_in_the_job_itself(customer: Path) -> None:
    template = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}" + "{# long #}" * 60
    checked = run(customer, [{"messages": conversation(seed)} for seed in range(60)], chat_template=template)
    (found,) = [row for row in checked.findings if row.check == "chat"]
    assert found.detail.startswith("60 conversations by the job's template")

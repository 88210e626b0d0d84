"""The proof of a run for a person: next words and tasks that base and result get right, and what both write. Imports torch late.

Held-out text of the target and of every general domain; nothing of it decided anything in the run's training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from connito.render import formats
from connito.views.proof_plot import Row
from connito.workloads.proof import (
    CONFIDENCE,
    GENERAL_TEXTS,
    GENERAL_TOKENS,
    TEXTS,
    TOKENS,
    Asked,
    before_and_after,
    compared,
)

# A vocabulary below this is one of letters.
_LETTERS = 1000
EXAMPLES, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 28


def prove(
    base: Path, state: Path, layers: Mapping[str, Sequence[int]], holdouts: Mapping[str, Path], target: str
) -> dict[str, Any]:
    """Return `{"rows", "examples", "precision"}`: what base and result get right on each domain, and texts of both.

    holdouts: a corpus by domain; `target` is the one that the run adapted to.
    """
    import torch

    from connito.base.loading import load_full, load_tokenizer
    from connito.data.corpus import Corpus
    from connito.moe.device import device_of
    from connito.moe.rows import write_rows
    from connito.moe.state import load_state
    from connito.runtime.compute import multiplies_bf16

    model, tokenizer = load_full(base, device=device_of()), load_tokenizer(base)
    if device_of().type == "cpu" and multiplies_bf16():
        # In half the time. Both are rounded alike, and most people who run a model round it so.
        model = model.to(torch.bfloat16)
    corpora = {domain: Corpus.load(path) for domain, path in holdouts.items()}
    asked = {domain: _asked(domain, corpus, tokenizer, domain == target) for domain, corpus in corpora.items()}
    rows = {int(layer): list(experts) for layer, experts in layers.items()}
    said = _write(model, tokenizer, corpora[target])
    before, after = before_and_after(model, tokenizer, asked, rows, lambda: write_rows(model, rows, load_state(state)))
    now = _write(model, tokenizer, corpora[target])
    examples = [{**old, "after": new["before"]} for old, new in zip(said, now, strict=True)]
    precision = str(model.dtype).removeprefix("torch.")
    return {"rows": compared(before, after, target), "examples": examples, "precision": precision}


def _asked(domain: str, corpus: Any, tokenizer: Any, is_target: bool) -> Asked:
    count, length = (TEXTS, TOKENS) if is_target else (GENERAL_TEXTS, GENERAL_TOKENS)
    documents = [corpus.document(i)[:length].tolist() for i in range(min(count, corpus.documents))]
    texts = [tokenizer.decode(document, skip_special_tokens=True) for document in documents]
    return Asked.of(domain, texts, is_target=is_target)


def _write(model: Any, tokenizer: Any, corpus: Any) -> list[dict[str, Any]]:
    """Continue the beginnings of held-out texts as a product would: sampled, without repeating itself, by a fixed seed."""
    import torch
    from transformers import set_seed

    length = PROMPT_TOKENS + NEW_TOKENS
    fitting = [i for i in range(corpus.documents) if len(corpus.document(i)) >= length] or [0]
    spread = fitting[:: max(1, len(fitting) // EXAMPLES)][:EXAMPLES]
    documents = [corpus.document(index)[:length].tolist() for index in spread]
    # All at once: a step reads all weights, however many texts it writes.
    begun = max(1, min(PROMPT_TOKENS, *(len(document) - 1 for document in documents)))
    prompts = torch.tensor([document[:begun] for document in documents], device=model.device)
    # Where tokens are letters, text repeats them as it should.
    letters = len(tokenizer) < _LETTERS
    set_seed(spread[0])
    with torch.no_grad():
        out = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=0.6,
            top_p=0.9,
            repetition_penalty=1.0 if letters else 1.2,
            pad_token_id=tokenizer.eos_token_id,
        )
    return [
        {
            "prompt": tokenizer.decode(document[:begun]),
            "reference": tokenizer.decode(document[begun:]),
            "before": str(tokenizer.decode(written[begun:], skip_special_tokens=True)),
        }
        for document, written in zip(documents, out, strict=True)
    ]


def markdown(report: Mapping[str, Any], proof: Mapping[str, Any]) -> str:
    """Return the text of `proof.md`."""
    cycles = formats.count(len(report["cycles"]), "cycle")
    lines = [
        f"# {report['run']}: what {report['base']} knows of {report['domain']} after {cycles}",
        "",
        "![What is right, before and after](proof.svg)",
        "",
        (
            "Text that nobody trained on. A word, or an answer, is right when greedy decoding gives it exactly after all "
            f"that goes before. Changes are in points of 100, with paired {formats.percent(CONFIDENCE, 0)} intervals over texts."
        ),
        "",
        "| text | use | what | before | after | change | interval | rests on | |",
        "|---|---|---|---:|---:|---:|---|---|---|",
    ]
    lines += [_line(Row(**row)) for row in proof["rows"]]
    lines += ["", *_losses(report), ""]
    for number, example in enumerate(proof["examples"], start=1):
        lines += [f"## Text {number}", ""]
        for title, part in (
            ("It begins", "prompt"),
            ("and goes on", "reference"),
            (f"### Written by {report['base']}", "before"),
            (f"### Written after the run, on {report['domain']}", "after"),
        ):
            lines += [title, "", _quote(example[part]), ""]
    lines.append(f"{_HOW} Both models computed in {proof['precision']}.")
    return "\n".join(lines) + "\n"


_HOW = (
    "Texts are the first, a middle and a late one that are long enough, not chosen ones; written with temperature 0.6, top-p "
    "0.9, a penalty on words that were just said and a fixed seed."
)


def _line(row: Row) -> str:
    verdict = "better" if row.low > 0 else "worse" if row.high < 0 else "no difference that this much text can show"
    shares = f"{formats.percent(row.before)} | {formats.percent(row.after)} | {100 * row.change:+.1f}"
    interval = f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
    rests = f"{row.count:,} in {formats.count(row.texts, 'text')}"
    return f"| {row.domain} | {row.use} | {row.what} | {shares} | {interval} | {rests} | {verdict} |"


def _losses(report: Mapping[str, Any]) -> list[str]:
    first, last = report["totals"]["target_loss_first"], report["totals"]["target_loss_last"]
    if first is None:
        return []
    tokens = report["cycles"][-1]["domains"][report["domain"]].get("tokens", 0)
    rests = f", on {formats.count(tokens, 'token')} of the hold-out's report part" if tokens else ""
    return [f"The loss of {report['domain']} went {first:.4f} → {last:.4f} nats per token{rests}."]


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in (text.splitlines() or [""]))

"""Continuations of held-out documents by base and adapted model, by greedy decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLES, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 40


def before_and_after(
    base: Path, state: Path, layers: Mapping[str, Sequence[int]], holdout: Path
) -> list[dict[str, Any]]:
    """Return, for the first held-out documents that are long enough, `{"prompt", "reference", "before", "after"}`.

    `prompt` is the start of the document and `reference` how it goes on. `before` is `{"text", "loss"}` of the base: its
    own greedy continuation, and the loss of the reference given the prompt in nats per token; `after` the same with the
    expert state inserted. Imports torch.
    """
    from connito.base.loading import load_full, load_tokenizer
    from connito.data.corpus import Corpus
    from connito.moe.device import device_of
    from connito.moe.rows import write_rows
    from connito.moe.state import load_state

    corpus = Corpus.load(holdout)
    length = PROMPT_TOKENS + NEW_TOKENS
    long_enough = [index for index in range(corpus.documents) if len(corpus.document(index)) >= length]
    documents = [corpus.document(index)[:length].tolist() for index in (long_enough or [0])[:EXAMPLES]]
    model, tokenizer = load_full(base, device=device_of()), load_tokenizer(base)
    before = [_continue(model, tokenizer, document) for document in documents]
    write_rows(model, {int(layer): list(experts) for layer, experts in layers.items()}, load_state(state))
    after = [_continue(model, tokenizer, document) for document in documents]
    return [
        {
            "prompt": tokenizer.decode(document[:PROMPT_TOKENS]),
            "reference": tokenizer.decode(document[PROMPT_TOKENS:]),
            "before": old,
            "after": new,
        }
        for document, old, new in zip(documents, before, after, strict=True)
    ]


def _continue(model: Any, tokenizer: Any, document: list[int]) -> dict[str, Any]:
    import torch

    from connito.moe.head import Head

    prompt = document[:PROMPT_TOKENS]
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        ids = torch.tensor([document], device=model.device)
        losses = Head(model).nll(ids[:, :-1], ids[:, 1:])[0, len(prompt) - 1 :]
    text = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    return {"text": str(text), "loss": float(losses.mean()) if len(losses) else None}


def markdown(report: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of `generation.md`."""
    first, last = report["totals"]["target_loss_first"], report["totals"]["target_loss_last"]
    losses = (
        f" Over the whole hold-out the loss went {first:.4f} → {last:.4f} nats per token." if first is not None else ""
    )
    adapted = f"After {len(report['cycles'])} cycles on {report['domain']}"
    sections = "".join(
        f"## Document {number}\n\nIt begins\n\n{_quote(example['prompt'])}\n\nand goes on\n\n{_quote(example['reference'])}\n\n"
        f"### Before: {report['base']}\n\n{_side(example['before'])}### {adapted}\n\n{_side(example['after'])}"
        for number, example in enumerate(examples, start=1)
    )
    return (
        f"# {report['run']}: what changed in the model's writing\n\n"
        "The first held-out documents, not chosen ones. Greedy decoding; beside each text, the loss of how the document "
        f"really goes on.{losses}\n\n{sections}"
    )


def _side(written: Mapping[str, Any]) -> str:
    loss = "" if written["loss"] is None else f"Loss of the real text: {written['loss']:.3f} nats per token.\n\n"
    return f"{_quote(written['text'])}\n\n{loss}"


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in (text.splitlines() or [""]))

"""What the adapted model writes where the base wrote something else: greedy, from the same held-out prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROMPT_TOKENS, NEW_TOKENS = 24, 40


def before_and_after(
    base: Path, state: Path, layers: Mapping[str, Sequence[int]], holdout: Path, sequence_length: int
) -> dict[str, Any]:
    """`{"prompt", "before", "after", "reference"}`: the start of a held-out document, its continuation by the base, by
    the base with the expert state inserted, and as it really goes on. Imports torch."""
    from connito.base.loading import load_full, load_tokenizer
    from connito.corpus import Corpus
    from connito.moe.insert import write_rows
    from connito.moe.state import load_state

    corpus = Corpus.load(holdout)
    index = next((i for i in range(corpus.documents) if len(corpus.document(i)) >= PROMPT_TOKENS + NEW_TOKENS), 0)
    document = corpus.document(index).tolist()
    prompt, rest = document[:PROMPT_TOKENS], document[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]
    model, tokenizer = load_full(base), load_tokenizer(base)
    before = _continue(model, tokenizer, prompt)
    write_rows(model, {int(layer): list(experts) for layer, experts in layers.items()}, load_state(state))
    after = _continue(model, tokenizer, prompt)
    return {
        "prompt": tokenizer.decode(prompt),
        "before": before,
        "after": after,
        "reference": tokenizer.decode(rest),
    }


def _continue(model: Any, tokenizer: Any, prompt: list[int]) -> str:
    import torch

    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))


def markdown(report: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """`generation.md`."""
    first, last = report["totals"]["target_loss_first"], report["totals"]["target_loss_last"]
    losses = f"Held-out loss {first:.4f} → {last:.4f} nats per token.\n\n" if first is not None else ""
    sections = "".join(
        f"## {title}\n\n{_quote(texts[key])}\n\n"
        for key, title in (
            ("prompt", "Prompt, from a held-out document"),
            ("before", f"Before: {report['base']}"),
            ("after", f"After {len(report['cycles'])} cycles on {report['domain']}"),
            ("reference", "How the document goes on"),
        )
    )
    return f"# {report['run']}: what changed in the model's writing\n\nGreedy decoding. {losses}{sections}"


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in (text.splitlines() or [""]))

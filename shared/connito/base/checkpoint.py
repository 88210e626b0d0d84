"""Saving a base model in the ordinary Hugging Face layout, with bytes that depend on nothing but the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from connito.moe.state import write_safetensors


def save_checkpoint(
    model: Any,
    out_dir: Path,
    tokenizer: Any,
    card: Mapping[str, str] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Path:
    """Write config.json, model.safetensors (experts fused, `[experts, …]`) and the tokenizer; returns `out_dir`.

    Tied tensors are stored once. `transformers` loads the directory as it is.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out_dir)
    # A tied tensor is one parameter under two names; tensors that merely share memory are two.
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in once}
    write_safetensors(out_dir / "model.safetensors", tensors, {"format": "pt"}, progress)
    tokenizer.save_pretrained(out_dir)
    if card:
        (out_dir / "connito_base.json").write_text(json.dumps(dict(card), indent=1, sort_keys=True) + "\n")
    return out_dir

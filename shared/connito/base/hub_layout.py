"""Saving a model in the layout in which its family was published: tensors by the names that transformers 4, vLLM and
SGLang know, every expert by itself where the family stores them so.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from connito.base.pretrained import quiet

# What belongs to a model beside its weights, by the beginning of the file's name.
COMPANIONS = ("generation_config", "chat_template", "LICENSE", "LICENCE", "NOTICE", "COPYING")


def save_hub(model: Any, out_dir: Path, tokenizer: Any) -> Path:
    """Write config.json, model.safetensors in the family's own layout, and the tokenizer; returns `out_dir`.

    The configuration says what changed between transformers 4 and 5 in the words of both.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from connito.moe.state import write_safetensors

    out_dir.mkdir(parents=True, exist_ok=True)
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name in once}
    # What a loader notes here says how *that* checkpoint was read, which may have been fused already.
    noted = model.__dict__.pop("_weight_conversions", None)
    try:
        with quiet():
            tensors = revert_weight_conversion(model, tensors)
            model.config.save_pretrained(out_dir)
            tokenizer.save_pretrained(out_dir)
    finally:
        if noted is not None:
            model._weight_conversions = noted
    write_safetensors(out_dir / "model.safetensors", tensors, {"format": "pt"})
    _for_both(out_dir, model)
    return out_dir


def copy_companions(source: Path, out_dir: Path) -> None:
    """Copy the generation config, chat template, licence and notices that lie beside a checkpoint."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name.startswith(COMPANIONS):
            shutil.copyfile(path, out_dir / path.name)


def _for_both(folder: Path, model: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("architectures", [type(model).__name__])
    for alias, name in model.config.attribute_map.items():
        if name in config:
            config.setdefault(alias, config[name])
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config.setdefault("rope_scaling", None if scaling.get("rope_type", "default") == "default" else scaling)
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    _write(folder / "config.json", config)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and (said := json.loads(settings.read_text())).get("tokenizer_class") == "TokenizersBackend":
        _write(settings, {**said, "tokenizer_class": "PreTrainedTokenizerFast"})


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

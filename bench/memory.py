"""Predicted against measured memory of a training step, by shape and by part, on the CPU.

Predicted from the configuration alone (`connito.workloads.rehearsal`). Measured on random weights: the total is the
largest sum of what torch's own allocator gave out in two training steps, the parts are counted on the tensors of
another two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.harness import Options, Result, main, note

LAYERS = 3
SMALL: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 96,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 16, "num_local_experts": 16, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "n_group": 1, "topk_group": 1, "max_position_embeddings": 1024,
    "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
DENSE_BELOW = {"first_k_dense_replace": 1, "n_shared_experts": 2}
# Multi-head latent attention; `head_dim` is its rotary part.
LATENT = {**DENSE_BELOW, "num_key_value_heads": 4, "head_dim": 16}
FROZEN_IN_FOUR_BITS = {"residency": "four-bit", "engine": {"checkpointing": True}}


@dataclass(frozen=True)
class Shape:
    """A family, what differs from `SMALL`, and a miner's settings."""

    name: str
    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    work: Mapping[str, Any] = field(default_factory=dict)
    targets: int = 2
    helpers: int = 2


SHAPES = (
    Shape("GQA, top 4 of 16", "qwen3_moe"),
    Shape("the same in bfloat16", "qwen3_moe", dtype="bfloat16"),
    Shape("the same, one sequence at a time", "qwen3_moe", work={"micro_batch": 1}),
    Shape("the same, frozen weights in bfloat16", "qwen3_moe", work={"half": True}),
    Shape("top 8 of 16", "olmoe", {"num_experts_per_tok": 8, "num_key_value_heads": 4}),
    Shape("top 8, a miner that uses 1", "olmoe", {"num_experts_per_tok": 8}, work={"top_k": 1}),
    Shape("top 1 of 16", "qwen3_moe", {"num_experts_per_tok": 1}),
    Shape("few large experts", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, targets=1, helpers=1),
    Shape("MLA, shared experts", "deepseek_v2", LATENT),
    Shape("MLA, sigmoid router, bfloat16", "deepseek_v3", LATENT, "bfloat16"),
    Shape("shared expert, bfloat16 forward", "qwen2_moe", {"shared_expert_intermediate_size": 256}, work={"bf16": True}),
    Shape("eager attention with sinks, biases", "gpt_oss", dtype="bfloat16"),
    Shape("sigmoid router with bias", "glm4_moe", DENSE_BELOW),
    Shape("large vocabulary", "qwen3_moe", {"vocab_size": 65536}, "bfloat16"),
    Shape("long sequences", "qwen3_moe", work={"sequences": 1, "length": 768}),
    Shape("documents kept apart", "qwen3_moe", work={"packed": True}),
    Shape("documents kept apart, one sequence at a time", "olmoe", work={"packed": True, "micro_batch": 1, "length": 256}),
    Shape("no helpers", "olmoe", helpers=0),
    Shape("a merged expert for absent ones", "olmoe", work={"background": True}),
    Shape("masked routing", "qwen3_moe", work={"routing_mode": "masked"}),
    Shape("all frozen experts", "qwen3_moe", work={"residency": "all"}),
    Shape("all frozen experts in four bits", "qwen3_moe", dtype="bfloat16", work={"residency": "four-bit"}),
    Shape("checkpointing", "qwen3_moe", work={"engine": {"checkpointing": True}}),
    Shape("checkpointing, four bits, MLA", "deepseek_v2", LATENT, "bfloat16", FROZEN_IN_FOUR_BITS),
    Shape("moments of four bytes", "qwen3_moe", dtype="bfloat16", work={"engine": {"optimizer": "adamw"}}),
    Shape("grouped products", "qwen3_moe", dtype="bfloat16", work={"engine": {"experts": "grouped"}}),
    Shape("linear attention", "qwen3_next", {"linear_num_key_heads": 2, "linear_num_value_heads": 4}),
)  # fmt: skip


def run(options: Options) -> Result:
    """Compare every shape."""
    import torch

    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES[:: 4 if options.quick else 1]:
        note(shape.name)
        rows.append(compare(shape))
    ratios = [row["ratio"] for row in rows]
    return Result(
        {"layers": LAYERS, "steps": 2, "torch_threads": 1},
        rows,
        {
            "shapes": len(rows),
            "lowest": min(ratios),
            "highest": max(ratios),
            **{row["shape"]: row["ratio"] for row in rows},
        },
    )


def compare(shape: Shape) -> dict[str, Any]:
    """Return predicted and measured bytes of one shape; `ratio` is predicted over measured."""
    from connito.workloads.rehearsal import rehearse

    work = work_of(shape)
    config = config_of(shape)
    targets, helpers = experts_of(shape, config)
    begun = time.perf_counter()
    predicted = rehearse(config, targets, helpers, work)
    seconds = time.perf_counter() - begun
    total, parts = measure(config, targets, helpers, work)
    return {
        "shape": shape.name,
        "family": shape.family,
        "dtype": shape.dtype,
        "ratio": round(predicted.total / total, 3),
        "predicted": predicted.to_json(),
        "measured": {**parts, "total": total},
        "prediction_seconds": round(seconds, 2),
    }


def work_of(shape: Shape) -> Any:
    """Return the settings of a shape."""
    from connito.moe.engine import Engine
    from connito.moe.footprint import Workload

    engine = Engine(**shape.work.get("engine", {}))
    return Workload(**{"sequences": 4, "length": 128, **shape.work, "engine": engine})


def config_of(shape: Shape) -> Any:
    """Return the configuration, with the fields that the family knows."""
    import json

    from connito.base.pretrained import parse_config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[shape.family]()
    values = {name: value for name, value in {**SMALL, **shape.config}.items() if hasattr(known, name)}
    document = {"model_type": shape.family, "dtype": shape.dtype, "eos_token_id": None, "pad_token_id": None, **values}
    return parse_config(json.dumps(document).encode())


def experts_of(shape: Shape, config: Any) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Return the first experts of every layer as targets, the next ones as helpers."""
    from connito.workloads.rehearsal import same_everywhere

    chosen = same_everywhere(config, shape.targets + shape.helpers)
    return (
        {layer: experts[: shape.targets] for layer, experts in chosen.items()},
        {layer: experts[shape.targets :] for layer, experts in chosen.items()},
    )


def measure(config: Any, targets: Any, helpers: Any, work: Any) -> tuple[int, dict[str, int]]:
    """Return the peak of two real steps as the allocator has it, and by part of another two."""
    from connito.moe.live_bytes import LiveBytes
    from connito.moe.training import train_local
    from connito.workloads.rehearsal import footprint_of, text

    batches = text(work)
    batches["token" if work.packed else ...] = np.random.default_rng(0).integers(3, config.vocab_size, batches.shape)

    def steps(on_step: Any = None) -> None:
        train_local(
            model,
            batches,
            learning_rate=1e-3,
            bf16=work.bf16 or work.half,
            micro_batch=work.micro_batch,
            optimizer=work.engine.optimizer,
            on_step=on_step,
        )

    model = real(config, targets, helpers, work)
    total = held_bytes(model) + allocated_peak(steps)
    counted = LiveBytes(model)
    with counted:
        steps(counted.step_done)
    return total, footprint_of(counted.parts(), model).to_json()


def real(config: Any, targets: Any, helpers: Any, work: Any) -> Any:
    """Return a training model of random weights, as the loader would make it of a base that is stored so."""
    import tempfile
    from pathlib import Path

    import torch
    from connito.base.checkpoint import save_checkpoint
    from connito.base.loading import load_resident_local
    from connito.base.tiny import tokenizer
    from connito.moe.background import background
    from connito.moe.layout import require_moe_layers
    from connito.moe.prepare import prepare
    from connito.moe.resident import add_background
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        full = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        # As after training with a load-balancing loss: what a token is decides where it goes, and experts are used alike.
        torch.nn.init.normal_(full.get_input_embeddings().weight)
        merged = None
        if work.background:
            usage = {i: np.ones(layer.num_experts) for i, layer in require_moe_layers(full).items()}
            merged = background(full, targets, helpers, usage)
        save_checkpoint(full, Path(folder), tokenizer())
        del full
        how = {"top_k": work.top_k, "half": work.half, "residency": work.residency}
        model = load_resident_local(Path(folder), targets, helpers, work.routing_mode, **how)
    if merged is not None:
        add_background(model, merged)
    return prepare(model, work.engine, torch.device("cpu"))


def allocated_peak(work: Callable[[], object]) -> int:
    """Return the most bytes that `work` had from torch's allocator at once, beyond what there was before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    found = profiler.profiler.kineto_results.events()
    events = [(event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        peak = max(peak, live)
    return peak


def held_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


if __name__ == "__main__":
    main("memory", run, doc=__doc__)

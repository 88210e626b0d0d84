"""The parts on the engine and on published models' memory of `docs/explanation/costs.md`, from what their benchmarks wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench import optimizers
from bench.evidence import ROOT, Document, nats, paragraphs, ran, table

COSTS = ROOT / "docs/explanation/costs.md"
# What lies between them on the page is written here.
BEGIN, END = "<!-- written by bench.evidence -->\n", "<!-- until here -->\n"
GOALS = "<!-- goals, written by bench.evidence -->\n"
GPU = "<!-- on a GPU, written by bench.evidence -->\n"


def render_costs(page: str, documents: Mapping[str, Document]) -> str:
    """Return the page with its written parts written anew."""
    for begin, part in ((BEGIN, _engine(documents["engine"])), (GOALS, _goals(documents["goals"]))):
        page = _replaced(page, begin, part)
    return page


def render_gpu(page: str, document: Document) -> str:
    """Return the page with what was measured on a GPU written anew."""
    return _replaced(page, GPU, _on_gpu(document))


def _replaced(page: str, begin: str, part: str) -> str:
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    return before + begin + paragraphs(part) + END + after


def _on_gpu(document: Document) -> str:
    parity, services = document["parity"]["rows"], document["scoring"]["rows"]
    trained = [row for part in document if part.startswith("training ") for row in document[part]["rows"]]
    plain = [row for part in document if part.startswith("transformers ") for row in document[part]["rows"]]
    rows = [
        [
            row["model"],
            f"{row['predicted_bytes'] / 1e9:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{100 * (row['predicted_bytes'] / row['peak_bytes'] - 1):+.1f} %".replace("-", "−"),
            f"{row['tokens_per_second']:.0f}",
        ]
        for row in trained
    ]
    alone = "; ".join(
        f"{row['model']} {'does not fit' if 'out of memory' in row['failed'] else row['failed']}"
        if "failed" in row
        else f"{row['model']} {row['tokens_per_second']:.0f} tokens a second in {row['peak_bytes'] / 1e9:.2f} GB"
        for row in plain
    )
    speeds = ", ".join(f"a {row['service']} {row['tokens_per_second']:.0f}" for row in services)
    logits, gradients = (max(row[what] for row in parity) for what in ("logits", "gradients"))
    return f"""
`scripts/gpu-check`, {document["gpu"]}, torch {document["torch"]}: random weights of published shapes, frozen experts in four
bits, one sequence of 2048 tokens, five targets a layer (ten of Qwen3-30B-A3B), the second of two steps.

{table(("model", "predicted, GB", "measured peak, GB", "apart", "tokens a second"), rows)}
Transformers alone, with whole banks trained by torch's AdamW: {alone}. On a small mixture {speeds} tokens a second. In float32
the training models of {len(parity)} families are at most {logits:.0e} (logits) and {gradients:.0e}
(targets' gradients) from transformers' own, relative to the largest. [Every number](../evidence/gpu_check.json).
"""


def _goals(document: Document) -> str:
    settings, parts = document["settings"], ("weights", "masters", "gradients", "moments", "activations", "workspace")
    rows = [
        [
            row["model"],
            f"{row['targets_a_layer']:g}",
            *(f"{row['predicted'][part] / 1e9:.2f}" for part in (*parts, "total")),
            f"{row['goal'] / 1e9:.0f}",
            _met(row["predicted"]["total"], row["goal"]),
            ", ".join(f"`{setting}`" for setting in row["settings"]) or "none",
        ]
        for row in document["rows"]
    ]
    return f"""
`bench.goals`: gigabytes (10⁹ bytes) of training on a GPU, frozen experts in four bits, {settings["sequences"]} sequence of
{settings["length"]} tokens, weights in {settings["dtype"]}. *Targets* a layer on average: of DeepSeek-V2-Lite those that the
authors of ESFT published for {settings["task"]} at p = {settings["threshold"]}; of the others the same share of the experts
of every layer. *Settings* are what had to be turned to reach the goal:

{table(("model", "targets", *parts, "total", "goal", "met", "settings"), rows)}
Predicted from the configurations, not measured on a GPU. [Every number](../evidence/goals.json).
"""


def _met(total: int, goal: int) -> str:
    return "yes" if total <= goal else f"missed by {(total - goal) / 1e9:.2f}"


def _engine(document: Document) -> str:
    settings, learning = document["settings"], document["settings"]["learning"]
    speeds = [
        [
            way,
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f} MiB",
            f"{row['speed']:.2f}",
            f"{row['memory']:.2f}",
        ]
        for way, row in _under("speed, ", document)
    ]
    learned = [
        [
            *name.split(", "),
            nats(row["gain"]),
            _tenths(row["kept"]),
            f"{row['state_bytes']:.2f}",
            f"{row['disk_bytes']:.2f}",
        ]
        for name, row in _under("learned, ", document)
    ]
    steps = [
        [name, f"{row['first']:.2f} s", f"{row['later']:.3f} s", f"{100 * row['lost']:.1f} %"]
        for name, row in _under("optimiser, ", document)
    ]
    return f"""
`bench.engine`: {settings["trained"]} of a random model in bfloat16, {settings["batch"][0]} sequences of
{settings["batch"][1]} tokens, one torch thread. The plain loop is a script on transformers: the whole model, each selected
expert a parameter of its own, the loss over all logits, torch's AdamW. Connito's ways hold all frozen experts unless helpers
are named. *Peak* is the model and the most that torch's allocator gave out beyond it in two steps. Tokens a second are of
the processor's time:

{table(("way", "tokens a second", "peak", "times as fast", "times the memory"), speeds)}
Moments of one byte against four on the tiny base ({learning["cycles"]} cycles of {learning["steps"]} steps, AdamW's second
moment kept in a file between them). *Kept* is the gain as a share of that with four bytes on the same seed; *state* the
bytes of gradient, moments and what completes a trained value to float32, *disk* those of the file, for each value:

{table(("rows stored as", "optimizer", "gain", "kept", "state", "disk"), learned)}
AdamW over rows in bfloat16 by several implementations, one step of {math.prod(optimizers.SHAPE) / 1e6:.1f} million values;
*lost* is the distance from float32 AdamW as a share of the way that it went in {optimizers.STEPS} steps at a rate of
{optimizers.RATE:g}. The result is rounded to bfloat16, which is all that Connito's lose:

{table(("implementation", "first step", "later step", "lost"), steps)}
{ran(document)}"""


def _under(prefix: str, document: Document) -> list[tuple[str, Any]]:
    found = document["figures"]
    return [(key.removeprefix(prefix), row) for key, row in found.items() if key.startswith(prefix)]


def _tenths(found: Sequence[float]) -> str:
    """Return `99.9 % (99.8 to 100.1)` from [mean, low, high] as shares."""
    mean, low, high = (f"{100 * value:.1f}" for value in found)
    return f"{mean} % ({low} to {high})"

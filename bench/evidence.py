"""Every page whose figures benchmarks print, made from what they wrote: `python -m bench.evidence [--out out/bench]`.

Copies JSON and plots of full runs that are in the folder to `docs/evidence`, where what was published before stays
otherwise, and renders all pages of `bench.pages` from there, so that no figure on them is typed. A quick run is refused. Unit
tests render them again from the copies.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.decentralised_page import decentralised, on_demo_base
from bench.pilot_page import pilot

ROOT = Path(__file__).resolve().parent.parent
PAGE, COPIES = ROOT / "docs/explanation/evidence.md", ROOT / "docs/evidence"
ON_PAGE = (
    "pilot",
    "selection",
    "routing_modes",
    "residency",
    "forgetting",
    "decentralised",
    "decentralised_demo",
    "cost",
    "validator_throughput",
)
Document = Mapping[str, Any]


def render(documents: Mapping[str, Document]) -> str:
    """Return the page, from the documents of `ON_PAGE`."""
    return paragraphs("\n".join([_HEAD, *(_SECTIONS[name](documents[name]) for name in ON_PAGE)]))


def paragraphs(text: str) -> str:
    """Return Markdown with lines of one length."""
    return "\n\n".join(filter(None, map(_wrapped, text.split("\n\n")))) + "\n"


def _wrapped(paragraph: str) -> str:
    """Return lines of one length; tables, headings and pictures as they are."""
    text = paragraph.strip()
    plain = not text.startswith(("|", "#", "!"))
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) if plain else text


def published() -> dict[str, Document]:
    """Return all published documents by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(COPIES.glob("*.json"))}


def publish(folder: Path, names: Iterable[str]) -> list[str]:
    """Copy the documents of these names that are in `folder`, with their plots; returns their names.

    Raises `ValueError` where one is of a quick run.
    """
    there = [name for name in names if (folder / f"{name}.json").exists()]
    for name in there:
        if json.loads((folder / f"{name}.json").read_text())["settings"].get("quick"):
            raise ValueError(f"{folder / name}.json is of a quick run, which publishes nothing: run it without --quick")
    for name in there:
        for file in (f"{name}.json", f"{name}.svg"):
            if (folder / file).exists():
                shutil.copyfile(folder / file, COPIES / file)
    return there


def main() -> int:
    """Copy and render; 2 with the reason on stderr where a run publishes nothing."""
    from bench.pages import EVERY, NAMES

    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="where the benchmarks wrote (default %(default)s)"
    )
    try:
        new = publish(parser.parse_args().out, NAMES)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    documents = published()
    for part in EVERY:
        part.path.write_text(part.written(documents))
    pages = dict.fromkeys(str(part.path.relative_to(ROOT)) for part in EVERY)
    print(f"new: {', '.join(new) or 'nothing'}; written: {', '.join(pages)}")
    return 0


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def nats(found: Sequence[float]) -> str:
    """Return `0.319 (0.265 to 0.373)` from [mean, low, high]."""
    mean, low, high = (f"{value:.3f}".replace("-", "−") for value in found)
    return f"{mean} ({low} to {high})"


def percent(found: Sequence[float]) -> str:
    """Return `102 % (99 to 104)` from [mean, low, high] as shares."""
    mean, low, high = (f"{100 * value:.0f}".replace("-", "−") for value in found)
    return f"{mean} % ({low} to {high})"


def ran(document: Document) -> str:
    """Return what a benchmark ran on, with links to its numbers and its picture."""
    machine, what = document["machine"], "repetitions" if document["name"] == "cost" else "seeds"
    took = "" if document["settings"].get("in_parts") else f", {document['seconds'] / 60:.0f} minutes"
    return (
        f"{document['settings']['seeds']} {what}, {machine['cores']} cores of an {machine['cpu']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {_gpus(document)}{took}. "
        f"[Every number](../evidence/{document['name']}.json).\n\n![{document['name']}](../evidence/{document['name']}.svg)\n"
    )


def _gpus(document: Document) -> str:
    rows = document.get("rows", ())
    names = [row["gpu"] for row in rows if row.get("gpu")]
    if not names:
        return "no GPU"
    return f"for {len(names)} of {len(rows)} measurements an {' and an '.join(sorted(set(names)))}"


_HEAD = """# What the model side keeps, measured

Written by `python -m bench.evidence` from full runs; do not edit. Means over seeds with 95 % t intervals; losses
are held-out nats per token of the full model. The base is tiny (0.5 M parameters, generated text in four small
languages, one base a seed): figures say how choices compare, and do not carry over to large models as numbers.
"""


def _selection(document: Document) -> str:
    found, settings = document["figures"], document["settings"]
    rows = []
    for name in ("selected", "random", "least used", "all at equal bytes", "all"):
        key = name.replace(" ", "_")
        sent = f"{found[f'bytes_{key}'] / 2**20:.0f} MiB"
        rows.append([name, nats(found[f"gain_{key}"]), nats(found[f"elsewhere_{key}"]), sent])
    return f"""
## Are they the right experts?

`bench.selection`: {settings["experts_per_layer"]} experts a layer, {settings["steps"]} steps, everything else a
frozen helper. *Gain* is the fall of the target's loss, *elsewhere* the change on the other domains (positive is
worse), *sent* what a miner uploads in all.

{table(("trained", "gain", "elsewhere", "sent"), rows)}
Ahead of random by {nats(found["selected_over_random"])}, of the least used by
{nats(found["selected_over_least_used"])}, of training everything until as many bytes are sent by
{nats(found["selected_over_all_at_equal_bytes"])}.

{ran(document)}"""


def _routing(document: Document) -> str:
    found = document["figures"]
    arms = [key.removeprefix("lost, ") for key in found if key.startswith("lost, ")]
    rows = [[arm, nats(found[f"strayed, {arm}"]), percent(found[f"lost, {arm}"])] for arm in arms]
    pairs = [
        [key.removeprefix("target, "), nats(found[key]), nats(found[key.replace("target, ", "strayed, ")])]
        for key in found
        if key.startswith("target, ") and " minus " in key
    ]
    return f"""
## What a token does whose expert is not in memory

`bench.routing_modes`: one expert a layer is trained; *strayed* is KL(full model || compressed one) before training,
*lost* the share of the gain that full residence (`complement`) has and the arm has not, after inserting the rows
into the full model.

{table(("routing, frozen experts in memory", "strayed", "lost"), rows)}
Arms with as much in memory, paired by seed; positive means that the first one ends with the higher loss, or strays
further:

{table(("difference", "target loss", "strayed"), pairs)}
Hence the defaults: `natural` routing, and real helpers where few experts fit. A merged background expert beside one
helper cannot be told from two helpers; alone it is worse than one. With more experts a layer than these eight, helpers
are a last resort: see the next section.

{ran(document)}"""


def _residency(document: Document) -> str:
    found, settings = document["figures"], document["settings"]

    def under(prefix: str) -> list[str]:
        return [key.removeprefix(prefix) for key in found if key.startswith(prefix)]

    formats = [
        [name, *(f"{found[f'format, {name}'][key]:.{digits}f}" for key, digits in _OF_FORMATS)]
        for name in under("format, ")
    ]
    moved = [
        [
            part.removesuffix(" helpers"),
            *(f"{100 * found[f'traces, {part}'][key]:.0f} %" for key in ("moved", "tokens")),
        ]
        for part in sorted(under("traces, "), key=_task_and_count)
        if "weigh" not in part
    ]
    weighs = ", ".join(
        f"{found[f'traces, {task}, four bits weigh as many helpers']:.1f} ({task})" for task in settings["traces"]
    )
    arms = [
        [arm, f"{row['bytes'] / 2**20:.2f} MiB", percent(row["moved"]), _small(row["strayed"]), percent(row["kept"])]
        for arm in under("base, ")
        for row in [found[f"base, {arm}"]]
    ]
    return f"""
## Frozen experts in memory

`bench.residency`. On the routing of DeepSeek-V2-Lite that the authors of ESFT published (6 of 64 experts a token,
targets by `esft-token` at its default): the share of slots on experts that are neither target nor helper, and of tokens
that lose more than half of theirs. All in four bits moves none, and weighs as much as so many helpers: {weighs}.

{table(("domain, helpers a layer", "slots moved", "tokens mostly moved"), moved)}
End to end on a tiny base whose experts differ ({settings["experts"]}, {settings["steps"]} steps). *Bytes* are of the
frozen experts, as bfloat16 or in four bits; *moved* the share of slots that go to another expert than in the full model,
*strayed* KL(full model || training model) before training, *kept* the share of the gain that training with all experts
has, after inserting the rows into the full model:

{table(("frozen experts", "bytes", "moved", "strayed", "kept"), arms)}
Hence the default: all experts as stored where they fit, else all in four bits, else helpers. Libraries that pack in four
bits, on one expert of DeepSeek-V2-Lite's shape; *unpack* and *product* (64 tokens) in milliseconds on one core:

{table(("format", "bits a weight", "relative error", "unpack", "product"), formats)}
{ran(document)}"""


_OF_FORMATS = (("bits", 2), ("error", 3), ("unpack_ms", 1), ("product_ms", 1))


def _task_and_count(part: str) -> tuple[str, int]:
    task, what = part.split(", ")
    return task, int(what.split()[0]) if what[0].isdigit() else -1


def _small(found: Sequence[float]) -> str:
    """Return `0.0003 (0.0002 to 0.0004)` from [mean, low, high]."""
    mean, low, high = (f"{round(value, 4) + 0.0:.4f}".replace("-", "−") for value in found)
    return f"{mean} ({low} to {high})"


def _forgetting(document: Document) -> str:
    found = document["figures"]
    rows = []
    for method in ("expert-only", "full fine-tuning", "LoRA"):
        key = method.replace(" ", "_")
        for label, point in (
            ("lowest target loss", found[f"{key}_lowest_target"]),
            (f"general loss kept within {document['settings']['margin']}", found[f"{key}_lowest_target_general_kept"]),
        ):
            if point is not None:
                rows.append(
                    [
                        method,
                        label,
                        f"{point['learning_rate']:g}",
                        f"{100 * point['replay']:g} %",
                        nats(point["target"]),
                        nats(point["general"]),
                    ]
                )
    return f"""
## What the target's gain costs elsewhere

`bench.forgetting`: {document["settings"]["steps"]} steps on the same batches, every learning rate and replay share
of its grid; two settings of each method.

{table(("method", "chosen for", "rate", "replay", "change of target loss", "change of general loss"), rows)}
At its worst setting general loss rose by {found["expert-only_worst_general"]:.2f} (expert-only),
{found["full_fine-tuning_worst_general"]:.2f} (full fine-tuning) and {found["LoRA_worst_general"]:.2f} (LoRA). So
expert-only training is hard to misuse. It is not the lowest loss that replay can buy: where general text is at hand
and every weight may change, full fine-tuning with replay went further on both sides of the frontier on this base,
which is small, had not finished learning its general text either, and pays for it with the whole model (see the
costs below).

{ran(document)}"""


def _cost(document: Document) -> str:
    return f"""
## What it costs

Upload, memory and compute are three claims, told apart in [costs](costs.md).

{ran(document)}"""


def _throughput(document: Document) -> str:
    found = document["figures"]
    shapes = [key.removesuffix(": times faster") for key in found if key.endswith(": times faster")]
    rows = [
        [
            shape,
            f"{found[f'{shape}: times faster']:.1f}",
            f"{found[f'{shape}: times faster, cache built']:.1f}",
            f"{found[f'{shape}: at most, by arithmetic']:.1f}",
        ]
        for shape in shapes
    ]
    raced = [key.removesuffix(", raced: times_faster") for key in found if key.endswith(", raced: times_faster")]
    races = [
        [
            name,
            f"{found[f'{name}, raced: times_faster'][0]:.1f}",
            percent(found[f"{name}, raced: share_of_sequences_read"]),
            percent(found[f"{name}, raced: verdicts_agree"]),
        ]
        for name in raced
    ]
    return f"""
## Submissions judged per minute

`bench.validator_throughput`, against copying the model and running all of it for each submission; the aim is
{found["goal_times_faster"]:.0f} times. Swapping rows in place and keeping what lies below the first adapted layer:

{table(("shape", "times faster", "once the cache is built", "what a cache can save"), rows)}
With a race on top (`scoring.minimum_sequences`), on trained submissions:

{table(("base", "times faster", "share of the budget read", "same verdict"), races)}
{ran(document)}"""


_SECTIONS: dict[str, Callable[[Document], str]] = {
    "pilot": pilot,
    "selection": _selection,
    "routing_modes": _routing,
    "residency": _residency,
    "forgetting": _forgetting,
    "decentralised": decentralised,
    "decentralised_demo": on_demo_base,
    "cost": _cost,
    "validator_throughput": _throughput,
}


if __name__ == "__main__":
    sys.exit(main())

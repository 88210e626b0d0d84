"""The measured parts of `docs/explanation/library.md`: composing, searching, smaller models, a shelf (`bench.evidence`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.evidence import ROOT, Document, nats, paragraphs, percent, ran, table

PAGE = ROOT / "docs/explanation/library.md"
END = "<!-- until here -->\n"


def render(page: str, document: Document) -> str:
    """Return the page with a document's part written anew."""
    name = document["name"]
    begin = f"<!-- {name}, written by bench.evidence -->\n"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    return before + begin + "\n" + paragraphs(PARTS[name](document)) + "\n" + END + after


COMPOSED = {
    "base": "base",
    "single_recipes": "the recipes expert alone",
    "single_logs": "the logs expert alone",
    "single_poems": "the poems expert alone",
    "linear": "`linear`: weighted mean",
    "sum": "`sum`: all changes added",
    "ties": "`ties`, density 0.5",
    "lorahub": "weights learned on 12 sequences (LoRAHub)",
    "arrow": "Arrow, best variant a token",
    "arrow_soft": "Arrow, all variants mixed",
    "molora": "MoLoRA, router trained on 12 sequences",
    "uniform": "the same mixture for every token",
    "mbc_2_arrow": "two clusters merged, then Arrow",
    "flex": "`flex`: additions beside the base's experts",
    "btx": "`btx`: an MoE of dense branches",
    "joint": "joint training",
}


def _composition(document: Document) -> str:
    found = document["figures"]
    rows = [
        [
            label,
            f"{found[f'union_{method}'][0]:.3f}",
            "–" if method == "base" else nats(found[f"saved_{method}"]),
            _two(found[f"kept_{method}"]) if f"kept_{method}" in found else "–",
            "–" if method == "base" else nats(found[f"ledgers_{method}"]),
        ]
        for method, label in COMPOSED.items()
    ]
    upgrade = ""
    if "upgrade_own" in found:
        upgrade = (
            f"\nReplacing the poems expert by one trained twice as long (BAR) was accepted in {found['upgrades_accepted']:.0%} "
            f"of the seeds; there poems change by {nats(found['upgrade_own'])}, another domain by "
            f"{found['upgrade_others_worst']:+.3f} at most. "
            "It is refused where a domain would lose more than 0.02 (`upgrade` has 0.01 by default)."
        )
    return f"""
{table(("", "union", "saved on the union", "kept", "bystander"), rows)}
Removing one expert of three from a composition raises the loss on its own domain by {nats(found["removing_hurts_its_own"])}, on
no other domain, in any seed, by more than {found["removing_hurts_others_most"]:.3f}.
{upgrade}

{ran(document)}"""


def _search(document: Document) -> str:
    found = document["figures"]
    names = {"signature": "routing signatures alone", "gradient": "one backward pass",
             "gradient_then_5_measured": "the same, the best five measured"}  # fmt: skip
    rows = [
        [
            label,
            _two(found[f"{name}_first_is_best"]),
            f"{found[f'{name}_best_in_first_3']:.2f}",
            f"{found[f'{name}_loss_saved_share']:.2f}",
            nats(found[f"{name}_regret"]),
        ]
        for name, label in names.items()
    ]
    head = ("ranked by", "first is best", "among the first three", "saving of the first over the best one's", "regret")
    return f"""
{table(head, rows)}
The index, at {document["settings"]["records"]:,} records in a file: rebuilt in {found["rebuild_seconds"]:.1f} s, a search takes
{found["search_p50_ms"]:.1f} ms at the median and {found["search_p99_ms"]:.0f} ms at p99, {found["search_cpu_ms"]:.1f} ms
of them on the processor.

{_without_picture(document)}"""


SMALLER = {
    **{f"{method}_{left}": f"{label}, {left} of 16 experts" for left in (8, 4, 2) for method, label in (
        ("naee", "NAEE"), ("router-weighted", "router-weighted"), ("moe-i2", "MoE-I² ratios"), ("random", "at random"),
        ("extracted", "extracted (EMO)"))},
    "zeros_50%": "half of the weights zero (MoE-Pruner)",
    "zeros_75%": "three quarters zero",
    "low_rank_50%": "low rank, half of the numbers (MoE-I²)",
    "low_rank_25%": "low rank, a quarter",
    "one_expert_dense": "one expert a layer, dense (task)",
    "one_expert_dense_tuned": "the same, tuned on the way",
    "skipping": "skipping at inference (NAEE β)",
}  # fmt: skip


def _lifecycle(document: Document) -> str:
    found = document["figures"]
    bases = ("standard", "emo")
    rows = [
        ["the full model (its loss)", _kilobytes(found, "full"), *(nats(found[f"{base}_full_loss"]) for base in bases)]
    ]
    rows += [
        [label, _kilobytes(found, method), *(nats(found[f"{base}_cost_{method}"]) for base in bases)]
        for method, label in SMALLER.items()
        if f"standard_cost_{method}" in found
    ]
    return f"""
{table(("", "kB", "standard", "emo"), rows)}
Skipping leaves out {found["standard_skipped_share"]:.0%} of the slots. {_apart(document)}

{ran(document)}"""


def _apart(document: Document) -> str:
    """Return which methods can be told from leaving out as many experts at random, seed by seed."""
    from bench.harness import interval

    rows = document["rows"]
    cost = {(row["base"], row["method"], row["seed"]): row["cost"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    sentences = []
    for left in (8, 4, 2):
        for other, against in (("random", "at random"), ("naee", "NAEE")):
            method = "naee" if other == "random" else "extracted"
            saved = interval(
                [cost["standard", f"{other}_{left}", s] - cost["standard", f"{method}_{left}", s] for s in seeds]
            )
            name = "NAEE" if method == "naee" else "extracting"
            verdict = "" if saved[1] > 0 or saved[2] < 0 else ", which nothing tells from none"
            sentences.append(f"{name} costs {nats(saved)} less than {against} at {left}{verdict}")
    gain = interval([cost["standard", "extracted_4", seed] - cost["emo", "extracted_4", seed] for seed in seeds])
    told = "" if gain[1] > 0 or gain[2] < 0 else ", which nothing tells from none"
    return (
        f"On the standard base, seed by seed: {'; '.join(sentences)}. Training on document pools makes extracting four experts "
        f"{nats(gain)} cheaper{told}."
    )


def _compounding(document: Document) -> str:
    found, rows, settings = document["figures"], document["rows"], document["settings"]
    lines = []
    for chain in ("dialects", "strangers"):
        for place in sorted({row["place"] for row in rows if row["chain"] == chain}):
            mine = [row for row in rows if (row["chain"], row["place"]) == (chain, place)]
            steps = [_steps([row[key] for row in mine]) for key in ("steps_from_base", "steps_from_shelf")]
            lines.append(
                [chain, str(place + 1), *steps, f"{sum(bool(row['started_from']) for row in mine)} of {len(mine)}"]
            )
    said = [
        f"{chain}: steps saved {percent(found[f'{chain}: steps saved, share'])}, loss at the end "
        f"{nats(found[f'{chain}: loss at the end, shelf − base'])} against the base's, slower than from the base "
        f"{found[f'{chain}: slower than from the base']} times"
        for chain in ("dialects", "strangers")
    ]
    return f"""
Steps until {settings["target_share"]:.0%} of what {settings["steps"]} steps from the base gain, looked at every
{settings["look_every"]}; *from the shelf* where the selector's rule chose an expert of the chain so far:

{table(("chain", "domain", "from the base", "from the shelf", "started from the shelf"), lines)}
Over the domains that had a shelf, {"; ".join(said)}.

{ran(document)}"""


def _kilobytes(found: Mapping[str, Any], method: str) -> str:
    return f"{found[f'standard_bytes_{method}'] / 1000:.0f}"


def _steps(values: Sequence[float]) -> str:
    from bench.harness import interval

    mean, low, high = interval([float(value) for value in values])
    return f"{mean:.0f} ({low:.0f} to {high:.0f})"


def _two(found: Sequence[float]) -> str:
    mean, low, high = (f"{value:.2f}".replace("-", "−") for value in found)
    return f"{mean} ({low} to {high})"


def _without_picture(document: Document) -> str:
    return ran(document).split("![")[0].rstrip()


# What serving twenty experts at once should reach: of the base's throughput, times models swapped in turn, of base and rows.
OF_BASE, TIMES_SWAPPED, OF_MEMORY = 0.9, 5.0, 1.05


def _serving(document: Document) -> str:
    rows = [
        [
            row["shape"],
            _held(row["mixed_of_base_alone"], OF_BASE),
            _held(row["mixed_times_swapped"], TIMES_SWAPPED),
            f"{row['base_alone_times_swapped']:.2f}",
            f"{row['mixed_times_reloaded']:.2f}",
            f"{(row['base_bytes'] + row['memory_over_rows'] * row['row_bytes']) / (row['base_bytes'] + row['row_bytes']):.3f}",
            f"{row['same_answers']:.0%}",
        ]
        for row in document["rows"]
    ]
    head = [
        "shape", f"mixed, of the base alone (goal {OF_BASE})", f"mixed, times swapped (goal {TIMES_SWAPPED:g})",
        "base alone, times swapped", "mixed, times reloaded", f"memory, of base and rows (goal {OF_MEMORY})", "same answers",
    ]  # fmt: skip
    settings, machine = document["settings"], document["machine"]
    return (
        f"{settings['experts']} requests, each for an expert of its own, in one batch, {settings['answer']} tokens each: "
        "against as many for the base alone, against the same models swapped into the base in turn, and against reading each "
        "from disk as well.\n\n"
        f"{table(head, rows)}\n\n"
        "What the base alone gains over swapping is what batching gains; a mixed batch cannot gain more. Where the "
        "experts are small and many (FINE), that is below the goal. A mixed batch reads more rows than the base's: where few "
        "experts serve many tokens, each is read once more for every expert that replaces it.\n\n"
        f"Processor time in one thread, best of {settings['rounds']} rounds with the arms in turn; random weights of the "
        f"shapes in `bench.serving`; {machine['cores']} cores of an {machine['cpu']}, no GPU. "
        "[Every number](../evidence/serving.json).\n"
    )


def _held(value: float, goal: float) -> str:
    return f"{value:.2f}" if value >= goal else f"{value:.3f} (missed)"


PARTS = {
    "composition": _composition,
    "search": _search,
    "lifecycle": _lifecycle,
    "compounding": _compounding,
    "serving": _serving,
}

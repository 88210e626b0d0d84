"""Render the delivery report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from connito.render import formats
from connito.views.coverage import Coverage
from connito.wire.identity import short_key

Document = Mapping[str, Any]


def markdown(document: Document) -> str:
    """Return the report of `jobs.delivery` in Markdown."""
    parts = [
        _head(document),
        _result(document),
        _changed(document),
        _cycles(document),
        _contributors(document),
        _use(document),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(document: Document) -> str:
    outcome, expert = document["outcome"], document["expert"]
    lines = [f"# Delivery: {document['domain']}", ""]
    lines.append(f"Run `{document['run']}` on `{document['base']['name']}` {outcome['status']}: {outcome['detail']}.")
    if expert is None:
        lines += [
            "",
            "No expert came out of it: nothing that was submitted passed the gate, or the run did not complete.",
        ]
        if document["shelf"]:
            lines += ["", f"{document['shelf'][0].upper()}{document['shelf'][1:]}."]
        return "\n".join(lines)
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| expert | `{expert['expert_id']}`, {expert['bytes']:,} bytes, {formats.count(expert['parameters'], 'parameter')} |",
        f"| SHA-256 | `{expert['digest']}` |",
        f"| base | `{document['base']['name']}`, manifest `{document['base']['manifest']}` |",
        f"| licence | {document['license'] or 'not stated'} |",
        f"| shown to | {document['visibility']} |",
        f"| data | {document['data_statement'] or 'not stated'} |",
    ]
    if document["start"] is not None:
        lines.append(f"| start | {document['start']['detail']} |")
    return "\n".join(lines)


def _result(document: Document) -> str:
    """Return measured rows where there are any, else the log's figures, which have no intervals."""
    found = document["measured"]
    if found is None:
        return _from_log(document)
    level = formats.percent(found["confidence"], 0)
    lines = [
        "## Before and after",
        "",
        (
            "Held-out loss in nats per token, base against result, measured by whoever wrote this report; paired "
            f"{level} intervals over sequences. Lower is better. None of this text decided anything in the run."
        ),
        "",
        "| text | use | before | after | change | interval | sequences | tokens | |",
        "|---|---|---:|---:|---:|---|---:|---:|---|",
    ]
    lines += [_row(row) for row in found["rows"]]
    lines += _words(found["right"])
    lines += _tasks(found)
    if any("start" in row for row in found["rows"]):
        begun = ", ".join(f"{row['name']} {row['start']:.4f}" for row in found["rows"])
        lines += ["", f"The run began at its start expert, not at the base: {begun}."]
    if found["apart"] is not None:
        lines += ["", f"These losses are within {found['apart']:.2g} nats per token of those that the run published."]
    return "\n".join(lines)


def _words(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of what is right: words, and answers that the text asks for."""
    if not rows:
        return
    yield from (
        "",
        "Next words, and answers that the text asks for, that greedy decoding gives exactly; change in points of 100.",
        "",
        "| text | what | before | after | change | interval | rests on |",
        "|---|---|---:|---:|---:|---|---|",
    )
    for row in rows:
        yield (
            f"| {row['domain']} | {row['what']} | {formats.percent(row['before'])} | {formats.percent(row['after'])} "
            f"| {100 * row['change']:+.1f} | {100 * row['low']:+.1f} to {100 * row['high']:+.1f} "
            f"| {row['count']:,} in {formats.count(row['texts'], 'text')} |"
        )


def _tasks(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the job's tasks, which were fixed before the run began."""
    if found.get("tasks_missing"):
        yield from ("", f"The job's tasks were not measured: {found['tasks_missing']}.")
    if not found.get("tasks"):
        return
    yield from (
        "",
        "Tasks of lm-evaluation-harness, fixed before the run. No item shares thirteen words in a row with the training text.",
        "Change in points of 100, paired by item.",
        "",
        "| task | metric | before | after | change | interval | items |",
        "|---|---|---:|---:|---:|---|---:|",
    )
    for row in found["tasks"]:
        low, high = row["interval"]
        yield (
            f"| {row['task']} | {row['metric']} | {formats.percent(row['base'])} | {formats.percent(row['score'])} "
            f"| {100 * (row['score'] - row['base']):+.1f} | {100 * low:+.1f} to {100 * high:+.1f} | {row['items']} |"
        )


def _row(row: Mapping[str, Any]) -> str:
    return (
        f"| {row['name']} | {row['use']} | {row['before']:.4f} | {row['after']:.4f} | {row['change']:+z.4f} "
        f"| {row['low']:+z.4f} to {row['high']:+z.4f} | {row['sequences']} | {row['tokens']:,} | {verdict(row)} |"
    )


def verdict(row: Mapping[str, Any]) -> str:
    """Return better, worse, or that the change cannot be told from chance."""
    if row["high"] < 0:
        return "better"
    return "worse" if row["low"] > 0 else "no difference that this much text can show"


def _from_log(document: Document) -> str:
    cycles = document["cycles"]
    if not cycles:
        return ""
    first, last = cycles[0]["domains"], cycles[-1]["domains"]
    lines = [
        "## Before and after",
        "",
        "Held-out loss in nats per token as the run published it, without intervals (they need `--measure`).",
        "",
        "| text | before | after | change |",
        "|---|---:|---:|---:|",
    ]
    for name, losses in last.items():
        before = first[name]["before"]
        lines.append(f"| {name} | {before:.4f} | {losses['after']:.4f} | {losses['after'] - before:+z.4f} |")
    return "\n".join(lines)


def _changed(document: Document) -> str:
    chosen = document["selection"]
    if chosen is None:
        return ""
    share = formats.percent(chosen["target_parameters"] / max(1, chosen["model_parameters"]))
    lines = [
        "## What changed",
        "",
        (
            f"{chosen['selected']} of {formats.count(chosen['total'], 'routed expert')}, "
            f"{share} of the model's parameters. Every "
            "other tensor is the base's, bit for bit."
        ),
        "",
        f"Miners were given {Coverage(document['coverage']['read'], document['coverage']['there'])}.",
        "",
        "| layer | experts |",
        "|---:|---|",
    ]
    lines += [f"| {layer} | {', '.join(map(str, sorted(experts)))} |" for layer, experts in chosen["layers"].items()]
    return "\n".join(lines)


def _cycles(document: Document) -> str:
    if not document["cycles"]:
        return ""
    lines = ["## Cycles", "", "| cycle | target loss | gate | merged | refused or unpaid |", "|---:|---|---|---|---|"]
    for cycle in document["cycles"]:
        refused = [f"{row['miner']} ({row['reason']})" for row in cycle["submissions"] if row["reason"]]
        loss = f"{cycle['target_loss_before']:.4f} → {cycle['target_loss_after']:.4f}"
        lines.append(
            f"| {cycle['cycle']} | {loss} | {cycle['gate']} | {', '.join(cycle['merged']) or '–'} | {', '.join(refused) or '–'} |"
        )
    upload = document["totals"]["upload_bytes_per_miner_and_cycle"]
    if upload:
        lines += ["", f"A miner uploaded {formats.size(upload)} a cycle."]
    return "\n".join(lines)


def _contributors(document: Document) -> str:
    if not document["contributors"]:
        return ""
    lines = ["## Who contributed", "", "| miner | share of the reward | cycles merged in |", "|---|---:|---:|"]
    for row in document["contributors"]:
        name = f"{row['label']} (`{short_key(row['miner'])}`)" if row["label"] else f"`{short_key(row['miner'])}`"
        lines.append(f"| {name} | {formats.percent(row['share'])} | {row['merged']} |")
    return "\n".join(lines)


def _use(document: Document) -> str:
    commands = document["commands"]
    lines = list(_load(document))
    lines += ["## Verify it", "", "```bash"]
    if "verify" in commands:
        lines += [f"{commands['take']}", f"{commands['verify']}     # offline: file, record, base"]
    lines += [f"{commands['audit']}     # every score, merge and version again, from the log", "```"]
    return "\n".join(lines)


def _load(document: Document) -> Iterator[str]:
    if document["expert"] is None:
        return
    yield from (
        "## Use it",
        "",
        "```python",
        "import connito, transformers",
        'model = transformers.AutoModelForCausalLM.from_pretrained("delivery/base")',
        'loaded = connito.load_expert(model, "delivery/expert")  # loaded.remove() gives the base back, bit for bit',
        "```",
        "",
    )

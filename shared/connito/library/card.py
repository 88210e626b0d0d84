"""Render the card of a library expert: its record as a page that a person reads before using it.

A deposited record names the digest of its card, and an audit renders the card again: its bytes are protocol. Numbers are
written here, not by `connito.render.formats`, which may change.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from connito.library.artifact import CARD_FILE, MODEL_FILE, MODEL_FORMAT
from connito.library.governance import TERMS, governance
from connito.library.plots import EXPERTS, LOSSES, plots
from connito.library.schema import Contributor, ExpertRecord, Loss, Score, Start, Version
from connito.render import formats

_CARD = """\
---
{front}
---

# {expert_id}

{intro}

| | |
|---|---|
| base model | `{base_name}`{stored}, manifest `{manifest}` |
| expert file | `{digest}`, {bytes:,} bytes |
| made by | {maker} |
| version | {version} |
| made from | {parents} |
| licence | {license} |
| visible to | {visibility} |
| data | {data_statement} |
{start}
## Measured effect

Held-out loss in nats per token, on sequences that decided nothing in the run. Lower is better.

| domain | before | after | change | tokens | 95 % interval of the change |
|---|---:|---:|---:|---:|---|
{losses}
{losses_plot}{scores}

{changes}{lineage}## Contributors

| miner | share of the reward | merged in | refused or unpaid for |
|---|---:|---:|---|
{contributors}

## Use

{use}
"""

_EXPERT = """\
An expert for **{domain}**: {selected} of the {total} routed experts of `{base_name}`, {parameters:,} parameters
({share:.1%} of the model). Every other tensor of the base stays as it is."""

_MODEL = """\
A model for **{domain}**, made by `{verb}`: {selected} of the {total} routed experts of `{base_name}`, in all
{parameters:,} parameters."""

_WITHIN = """\
A model for **{domain}**: `{base_name}` with {parents} in it, in all {parameters:,} parameters."""

_CHANGES = """\
## What it changes

{selected_by}| layer | experts |
|---:|---|
{layers}
{experts_plot}

"""

_SELECTED = "Selected by {method} at threshold {threshold:g}.\n\n"

_SCORES = """
## Scores

What its customer named before the run, asked of the base alone and of the result: loss in nats per token, where lower is
better, or a metric of lm-evaluation-harness.

| benchmark or task | metric | base | result | change | items | 95 % interval of the change |
|---|---|---:|---:|---:|---:|---|
{rows}"""

_LINEAGE = """\
## Lineage

| version | from | gate | merged | state |
|---:|---:|---|---|---|
{rows}

"""

_USE = """\
```python
import connito
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
loaded = connito.load_expert(model, "{expert_id}/")
loaded.remove()  # the base again, bit for bit
```

`connito library verify {expert_id}/` checks file, record and signatures without a network.
"""

_USE_GGUF = """\
```bash
llama-cli --model {expert_id}/{file} --prompt "…"
```

Ollama and LM Studio take the same file. `connito library verify {expert_id}/` checks every file without a network.
"""

_USE_MODEL = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{expert_id}/")
```

`connito library verify {expert_id}/` checks every file without a network.
"""


def _text(value: object) -> str:
    """Return a value of the record inside a table cell: one line, no column of its own."""
    return " ".join(str(value).split()).replace("|", "\\|") or "not stated"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _loss_row(row: Loss) -> str:
    before, after = row["before"], row["after"]
    change = "–" if before is None or after is None else f"{after - before:+.4f}"
    losses = f"{_number(before)} | {_number(after)} | {change}"
    return f"| {_text(row['domain'])} | {losses} | {row['tokens']:,} | {_interval(row)} |"


def _scores(record: ExpertRecord) -> str:
    """Return the card's part on benchmarks and tasks; empty for a record without any."""
    rows = [
        f"| {_text(row['name'])} | {_text(row['metric'])} | {row['before']:.4f} | {row['after']:.4f} | "
        f"{row['after'] - row['before']:+.4f} | {row['items']:,} | {_interval(row)} |"
        for row in record.get("scores", [])
    ]
    rows += [
        f"| {_text(name)} | not scored: {_text(why)} | | | | | |" for name, why in record.get("unscored", {}).items()
    ]
    return _SCORES.format(rows="\n".join(rows)) if rows else ""


def _interval(row: Loss | Score) -> str:
    return f"{row['change_low']:+.4f} to {row['change_high']:+.4f}" if "change_low" in row else "–"


def _front(record: ExpertRecord) -> str:
    """Return the YAML head that model hubs read. Every value is JSON, which is YAML."""
    domain, base = str(record["domain"]), str(record["base"]["name"])
    lines = [
        "library_name: connito",
        f"license: {_hub_license(str(record.get('license', '')))}",
        f"base_model: {json.dumps(base, ensure_ascii=False)}",
        f"base_model_relation: {'merge' if record.get('derived', {}).get('verb') == 'compose' else 'finetune'}",
        "pipeline_tag: text-generation",
        "tags:",
        *(
            f"- {json.dumps(tag, ensure_ascii=False)}"
            for tag in ("mixture-of-experts", "expert", "safetensors", domain)
        ),
    ]
    measured = [(row["domain"], row["after"]) for row in record["losses"] if row["after"] is not None]
    scores = [row for row in record.get("scores", []) if row["metric"] != "loss"]
    if measured or scores:
        lines += ["model-index:", f"- name: {json.dumps(record['expert_id'])}", "  results:"]
    for domain, after in measured:
        name = json.dumps(domain, ensure_ascii=False)
        lines += [
            "  - task: {type: text-generation}",
            f"    dataset: {{name: {name}, type: held-out}}",
            f"    metrics: [{{type: loss, name: nats per token, value: {after:.6f}}}]",
        ]
    for row in scores:
        name, metric = (json.dumps(row[key], ensure_ascii=False) for key in ("name", "metric"))
        lines += [
            "  - task: {type: text-generation}",
            f"    dataset: {{name: {name}, type: task}}",
            f"    metrics: [{{type: {metric}, name: {metric}, value: {row['after']:.6f}}}]",
        ]
    return "\n".join(lines)


def _hub_license(license_: str) -> str:
    """Return the licence's name on model hubs: lower-case SPDX, else `other`."""
    return license_.lower() if license_ in TERMS and not license_.startswith("LicenseRef") else "other"


def _intro(record: ExpertRecord) -> str:
    selection, expert, model = record["selection"], record["expert"], record["model_parameters"]
    whole = _MODEL if selection["total"] else _WITHIN
    return (whole if record.get("format") == MODEL_FORMAT else _EXPERT).format(
        parents=", ".join(f"`{parent['expert_id']}`" for parent in record.get("derived", {}).get("parents", [])),
        domain=_text(record["domain"]),
        base_name=_text(record["base"]["name"]),
        selected=selection["selected"] or "one",
        total=selection["total"],
        parameters=expert["parameters"],
        share=expert["parameters"] / model if model else 0.0,
        verb=record.get("derived", {}).get("verb", ""),
    )


def _maker(record: ExpertRecord) -> str:
    if "derived" in record:
        return f"`{record['derived']['verb']}`, {record['created']}"
    count = len(record["lineage"])
    versions = formats.count(count, "version")
    return f"run `{record['run']}`, {versions}, finished {record['created']}"


def _parents(record: ExpertRecord) -> str:
    derived = record.get("derived", {})
    named = [f"`{parent['expert_id']}` × {parent.get('weight', 1.0):g}" for parent in derived.get("parents", [])]
    how = f"{derived['verb']} of " if derived.get("verb") else ""
    return how + (
        ", ".join([*named, *(f"`{name}`" for name in record.get("parents", []) if not derived)]) or "the base"
    )


def _visibility(record: ExpertRecord) -> str:
    rules = governance(record)
    group = f"members of {rules['organisation']}"
    return {"public": "everybody", "private": "its owner alone", "organisation": group}[rules["visibility"]]


def _base_to_load(record: ExpertRecord) -> str:
    """Return what to give to transformers: a repository of a hub, or a folder that only its reader knows."""
    name = _text(record["base"]["name"])
    folder = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None
    return f'"path/to/{name}"' if folder else f'"{name}"'


def _lineage_row(row: Version) -> str:
    merged = ", ".join(f"{miner[:8]}… {weight:.3f}" for miner, weight in sorted(row["merged"].items())) or "–"
    return f"| {row['version']} | {row['parent']} | {row['gate']} | {merged} | `{row['state'][:16]}` |"


def _contributor_row(row: Contributor) -> str:
    name = f"{_text(row['label'])} ({row['miner'][:8]}…)" if row["label"] else f"{row['miner'][:8]}…"
    why = ", ".join(f"{reason} ×{count}" for reason, count in sorted(row["reasons"].items())) or "–"
    return f"| {name} | {row['share']:.1%} | {row['merged']} | {why} |"


def _start(start: Start | None) -> str:
    """Return the card's row on the expert that the run started from; empty if it was the base."""
    if start is None:
        return ""
    low, high = start["interval"]
    return (
        f"| started from | `{start['expert_id']}`: {start['rows']} of its experts, which saved {start['saved_on_probe']:.4f} "
        f"nats per token on the probe ({low:.4f} to {high:.4f}); losses below begin there |\n"
    )


def render(record: ExpertRecord, file: str = MODEL_FILE) -> str:
    """Return the Markdown card of a record; of a whole model, `file` has the weights."""
    selection, expert = record["selection"], record["expert"]
    drawn = plots(record)
    whole = _USE_MODEL if file == MODEL_FILE else _USE_GGUF
    use = whole if record.get("format") == MODEL_FORMAT else _USE
    changes = "" if record.get("format") == MODEL_FORMAT and not selection["layers"] else _CHANGES
    layers = sorted(selection["layers"].items(), key=lambda item: int(item[0]))
    return _CARD.format(
        front=_front(record),
        version=record.get("version") or "–",
        parents=_parents(record),
        visibility=_text(_visibility(record)),
        losses_plot=f"\n![change of the loss]({LOSSES})\n" if LOSSES in drawn else "",
        changes=changes.format(
            selected_by="" if "derived" in record else _SELECTED.format(**selection),
            layers="\n".join(f"| {layer} | {', '.join(map(str, ids))} |" for layer, ids in layers),
            experts_plot=f"\n![experts by layer]({EXPERTS})\n" if EXPERTS in drawn else "",
        ),
        scores=_scores(record),
        use=use.format(base=_base_to_load(record), expert_id=record["expert_id"], file=file),
        expert_id=record["expert_id"],
        domain=_text(record["domain"]),
        intro=_intro(record),
        maker=_maker(record),
        base_name=_text(record["base"]["name"]),
        stored=f", stored as {_text(record['base']['quantised'])}" if record["base"].get("quantised") else "",
        manifest=record["base"]["manifest"],
        digest=expert["digest"],
        bytes=expert["bytes"],
        license=_text(record["license"]),
        data_statement=_text(record["data_statement"]),
        start=_start(record.get("started_from")),
        losses="\n".join(map(_loss_row, record["losses"])),
        lineage=_LINEAGE.format(rows="\n".join(map(_lineage_row, record["lineage"]))) if record["lineage"] else "",
        contributors="\n".join(map(_contributor_row, record["contributors"])) or "| – | – | – | – |",
    )


def write_card(record: ExpertRecord, folder: Path) -> None:
    """Write the card and its plots into the folder of an expert."""
    file = next((path.name for path in folder.glob("*.gguf")), MODEL_FILE)
    (folder / CARD_FILE).write_text(render(record, file))
    for name, drawn in plots(record).items():
        (folder / name).write_text(drawn)

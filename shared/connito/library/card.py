"""The card of a library expert: the record, as a page that a person reads before using it."""

from __future__ import annotations

from typing import Any

_CARD = """\
# {expert_id}

An expert for **{domain}**: {selected} of the {total} routed experts of `{base_name}`, {parameters:,} parameters
({share:.1%} of the model). Every other tensor of the base stays as it is.

| | |
|---|---|
| base model | `{base_name}`, manifest `{manifest}` |
| expert file | `{digest}`, {bytes:,} bytes |
| made by | run `{run}`, {versions} versions, finished {created} |
| licence | {license} |
| data | {data_statement} |
{start}
## Measured effect

Held-out loss in nats per token, on sequences that decided nothing in the run. Lower is better.

| domain | before | after | change | tokens |
|---|---:|---:|---:|---:|
{losses}

## What it changes

Selected by {method} at threshold {threshold:g}.

| layer | experts |
|---:|---|
{layers}

## Lineage

| version | from | gate | merged | state |
|---:|---:|---|---|---|
{lineage}

## Contributors

| miner | share of the reward | merged in | refused or unpaid for |
|---|---:|---:|---|
{contributors}

## Use

```python
import connito
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base_name}")
loaded = connito.load_expert(model, "{expert_id}/")
loaded.remove()  # the base again, bit for bit
```
"""


def _text(value: object) -> str:
    """A value of the record inside a table cell: one line, no column of its own."""
    return " ".join(str(value).split()).replace("|", "\\|") or "not stated"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _loss_row(row: dict[str, Any]) -> str:
    before, after = row["before"], row["after"]
    change = "–" if before is None or after is None else f"{after - before:+.4f}"
    return f"| {_text(row['domain'])} | {_number(before)} | {_number(after)} | {change} | {row['tokens']:,} |"


def _lineage_row(row: dict[str, Any]) -> str:
    merged = ", ".join(f"{miner[:8]}… {weight:.3f}" for miner, weight in sorted(row["merged"].items())) or "–"
    return f"| {row['version']} | {row['parent']} | {row['gate']} | {merged} | `{row['state'][:16]}` |"


def _contributor_row(row: dict[str, Any]) -> str:
    name = f"{_text(row['label'])} ({row['miner'][:8]}…)" if row["label"] else f"{row['miner'][:8]}…"
    why = ", ".join(f"{reason} ×{count}" for reason, count in sorted(row["reasons"].items())) or "–"
    return f"| {name} | {row['share']:.1%} | {row['merged']} | {why} |"


def _start(start: dict[str, Any] | None) -> str:
    """Where the run started, when not from the base: the losses below then begin there."""
    if start is None:
        return ""
    low, high = start["interval"]
    return (
        f"| started from | `{start['expert_id']}`: {start['rows']} of its experts, which saved {start['saved_on_probe']:.4f} "
        f"nats per token on the probe ({low:.4f} to {high:.4f}); losses below begin there |\n"
    )


def render(record: dict[str, Any]) -> str:
    """The Markdown card of a record."""
    selection, expert, model = record["selection"], record["expert"], record["model_parameters"]
    layers = sorted(selection["layers"].items(), key=lambda item: int(item[0]))
    return _CARD.format(
        expert_id=record["expert_id"],
        domain=_text(record["domain"]),
        selected=selection["selected"],
        total=selection["total"],
        base_name=_text(record["base"]["name"]),
        manifest=record["base"]["manifest"],
        parameters=expert["parameters"],
        share=expert["parameters"] / model if model else 0.0,
        digest=expert["digest"],
        bytes=expert["bytes"],
        run=record["run"],
        versions=len(record["lineage"]),
        created=record["created"],
        license=_text(record["license"]),
        data_statement=_text(record["data_statement"]),
        start=_start(record.get("started_from")),
        method=selection["method"],
        threshold=selection["threshold"],
        losses="\n".join(map(_loss_row, record["losses"])),
        layers="\n".join(f"| {layer} | {', '.join(map(str, ids))} |" for layer, ids in layers),
        lineage="\n".join(map(_lineage_row, record["lineage"])),
        contributors="\n".join(map(_contributor_row, record["contributors"])) or "| – | – | – | – |",
    )

"""The page on peers, from what `bench.peers` wrote."""

from __future__ import annotations

from bench.evidence import ROOT, Document, paragraphs, table
from bench.peers import SIZES

PAGE = ROOT / "docs/explanation/peers.md"
HEAD = ("", "seconds a round", "slowest", "CPU seconds", "memory, GiB", "MB over loopback", "upload, MB")


def render(document: Document) -> str:
    """Return the page."""
    machine, settings = document["machine"], document["settings"]
    versions = {"Flower": settings["versions"]["flwr"], "NVFlare": settings["versions"]["nvflare"]}
    parts = [
        f"""# Beside others

Written by `python -m bench.evidence` from `bench.peers`; do not edit. {settings["workers"]} workers hand in as much as the
headings say, {settings["rounds"]} rounds, the first one left out, all in one run on {machine["cores"]} cores of an
{machine["cpu"]}, without a GPU. NVFlare {versions["NVFlare"]} and Flower {versions["Flower"]} send numbers to their clients,
get them back and average them; nothing else. Here a round is a cycle of `connito up`: one local step, commitment and
reveal, a validator's judgement, merge, gate, and every fact signed and in the log. *Raw* hands in rows as they are, *coded* is
the default. *Tuned* is with the sleeps between a peer's polls for work cut to {1000 * settings["poll_seconds"]:.0f} ms,
from outside.

Memory is that of all processes together, servers and workers, shared pages once. CPU and bytes are by round."""
    ]
    for size in SIZES:
        rows = [row for row in document["rows"] if row["megabytes"] == size]
        shown = [
            [
                row["who"],
                f"{row['seconds']:.2f}",
                f"{row['slowest']:.2f}",
                f"{row['cpu']:.1f}",
                f"{row['memory'] / 2**30:.1f}",
                f"{row['loopback'] / 1e6:.0f}",
                f"{row['upload'] / 1e6:.2f}",
            ]
            for row in rows
        ]
        parts.append(f"## {size} MB\n\n{_said(rows)}\n\n{table(HEAD, shown)}")
    return paragraphs("\n\n".join([*parts, "[Every number](../evidence/peers.json)."]))


def _said(rows: list[dict[str, float]]) -> str:
    """Return how the cycle here compares with each peer at its best."""
    here = {str(row["who"]): row["seconds"] for row in rows if str(row["who"]).startswith("here")}
    sentences = []
    for peer in ("NVFlare", "Flower"):
        best = min(row["seconds"] for row in rows if str(row["who"]).startswith(peer))
        times = (f"{seconds / best:.1f} × as long {who.partition(', ')[2]}" for who, seconds in here.items())
        sentences.append(f"Of a round of {peer} at its best a cycle here takes {' and '.join(times)}.")
    return " ".join(sentences)

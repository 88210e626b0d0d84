"""The page on wires, made from what `bench.wire` and `bench.hostile_codes` wrote: `python -m bench.wire_page OUT/wire.json …`.

Copies the documents to `docs/evidence` and writes `docs/explanation/wires.md`, so that no figure there is typed. A unit test
renders it again from the copy.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from bench.evidence import COPIES, ROOT, Document, paragraphs, table
from bench.harness import interval

PAGE, NAMES = ROOT / "docs/explanation/wires.md", ("wire", "hostile_codes")
DEFAULT = "ternary"
# (times fewer bytes, than what, share of the gain that is to be kept): rows are what was sent before there were codecs.
GOALS = ((24, "fewer_than_rows", "rows", 0.98), (500, "fewer_than_dense", "the dense model in float16", 0.95))
HONEST = 2000
# An arm with feedback, and the same without.
PAIRS = {
    "ternary": "ternary, no feedback",
    "low-rank 4": "low-rank 4, no feedback",
    "SparseLoCo style, 1 %": "top-k 1 %, no feedback",
}

# Arms of coded outer steps, and the same with versions as rows.
STEPS, UNCODED = ("steps in int8", "steps in int4", "steps in ternary"), "ternary, no feedback"


def render(document: Document, hostile: Document) -> str:
    """Return the page."""
    parts = [
        _HEAD,
        _goals(document),
        _uploads(document),
        _downloads(document),
        _feedback(document),
        _hostile(hostile),
        _cells(document),
        _END,
    ]
    return paragraphs("\n".join(parts))


def _goals(document: Document) -> str:
    lines = []
    for fewer, key, than, share in GOALS:
        reach = [
            arm
            for arm, up in _uploaded(document).items()
            if up[key] >= fewer and _as_dense(document, arm) and _everywhere(document, arm)
        ]
        best = max(reach, key=lambda arm: _least(document, arm), default="")
        found = (
            f"{best} keeps {_least(document, best):.1%} where it keeps least" if best else "no codec was measured there"
        )
        verdict = "met" if best and _least(document, best) >= share else "missed"
        lines.append([f"{fewer} × below {than}", f"{share:.0%} of the gain", found, verdict])
    far = [arm for arm, up in _uploaded(document).items() if up["fewer_than_dense"] >= HONEST and _all(document, arm)]
    shown = [arm for arm in far if _as_dense(document, arm)]
    told = "; ".join(f"{arm} keeps {_least(document, arm):.1%} where it keeps least" for arm in shown or far)
    lines.append(
        [
            f"{HONEST:,} × below the dense model in float16",
            "its loss",
            told or "nothing",
            "published" if shown else "not shown",
        ]
    )
    told = """A codec counts for a goal where it has as few bits a number on the rig as in the demo's shapes. Low rank has not:
the rig's matrices are tiny, so what a rank keeps on them says nothing of what it keeps on matrices of 576 by 1536."""
    return f"## Goals\n\n{told}\n\n{table(('upload', 'goal', 'measured', ''), lines)}"


def _uploads(document: Document) -> str:
    rows = [
        [arm, f"{up['bytes']:,}", f"{up['fewer_than_rows']:g}", f"{up['fewer_than_dense']:,}"]
        for arm, up in _uploaded(document).items()
    ]
    return f"""
## One upload

Noise in the shapes of the demo's selection, 31.9 M numbers: bytes of the file, and how many times fewer than rows in float32
and than the dense base in float16.

{table(("codec", "bytes", "× below rows", "× below dense"), rows)}
"""


def _downloads(document: Document) -> str:
    """Return what coded outer steps do, by pairs of cells of the same seed."""
    rows = []
    for arm in STEPS:
        pairs = _pairs(document, arm, UNCODED)
        if pairs:
            mean, low, high = interval([right / left for left, right in pairs])
            cells = [row for row in document["rows"] if row["arm"] == arm]
            whole = next(row["bytes"] for row in document["rows"] if row["arm"] == "rows")
            fewer = sum(whole / row["down_bytes"] for row in cells) / len(cells)
            rows.append([arm, f"{fewer:.1f}", str(len(pairs)), f"{mean:.1%}", _range(low, high, len(pairs))])
    told = """Whoever holds the version before fetches the outer step alone, coded as `merging.step_codec` says, and the version
*is* what that decodes to, for everybody ([ADR 52](../adr/0052-versions-as-coded-steps.md)). Uploads as by default, pairs of cells
with versions as rows and of the same seed, data and H; nothing that coding a step leaves out is carried to the next."""
    head = ("versions", "× below the state", "pairs", "gain, of that with rows", "95 % interval")
    return f"## Downloads\n\n{told}\n\n{table(head, rows)}\n"


def _pairs(document: Document, arm: str, other: str) -> list[tuple[float, float]]:
    """Return the gains of an arm behind those of another one in cells that are the same otherwise."""
    gains = {
        (row["arm"], row["steps"], row["data"], row["seed"]): row["start"] - row["end"] for row in document["rows"]
    }
    return [(gain, gains[arm, *key]) for (of, *key), gain in gains.items() if of == other and (arm, *key) in gains]


def _feedback(document: Document) -> str:
    """Return what feedback does to a codec, by pairs of cells of the same seed."""
    rows = []
    for with_it, without in PAIRS.items():
        pairs = _pairs(document, with_it, without)
        if pairs:
            more = sum(left < right for left, right in pairs)
            ratio = sum(right / left for left, right in pairs) / len(pairs)
            rows.append([with_it, str(len(pairs)), str(more), f"{ratio:.1%}"])
    told = """What coding left out is added to the next submission, or not: pairs of cells of the same seed, data and H. Miners
do so for `low-rank` and `top-k` alone."""
    head = ("codec", "pairs", "of them with more gain by feedback", "gain with feedback, of that without")
    return f"## Error feedback\n\n{told}\n\n{table(head, rows)}\n"


def _hostile(document: Document) -> str:
    """Return what came of uploads that no encoder writes."""
    told, settings = document["figures"], document["settings"]
    kept = {"inputs", "most_bytes", "bound", "within"}
    refused = " and ".join(
        f"{count:,} were refused as {reason}" for reason, count in told.items() if reason not in {*kept, "decoded"}
    )
    bound = "within" if told["within"] else "beyond"
    return f"""## Uploads that nobody's encoder wrote

`bench.hostile_codes`: {told["inputs"]:,} files of {len(settings["codecs"])} codecs, damaged or made of any bytes,
{settings["seeds"]} seeds. None ended the decoder: {refused},
{told["decoded"]:,} decoded to finite numbers.
Of every sixteenth the memory was traced: at most {told["most_bytes"]:,} bytes beside the file, {bound} the bound of
{told["bound"]:,}.
[Every number](../evidence/hostile_codes.json).
"""


def _cells(document: Document) -> str:
    parts = []
    for key in sorted({(kind, h) for _, h, kind in _measured(document)}):
        kind, h = key
        found = {arm: cell for (arm, steps, data), cell in _measured(document).items() if (data, steps) == key}
        rows = [
            [arm, f"{cell['fewer']:g}", f"{mean:.1%}", _range(low, high, cell["seeds"]), str(cell["seeds"])]
            for arm, cell in sorted(found.items(), key=lambda item: item[1]["fewer"])
            for mean, low, high in [cell["kept"]]
        ]
        cycles = document["settings"]["cycles"][str(h)]
        parts.append(
            f"### {kind}, H = {h}, {cycles} cycles\n\n{table(('codec', '× below rows', 'kept', '95 % interval', 'seeds'), rows)}"
        )
    settings = document["settings"]
    told = f"{settings['computed']} of the {settings['cells']} cells of `bench.wire` were computed for this page."
    return "\n\n".join(["## Closed loop on the tiny base", told, *parts])


def _range(low: float, high: float, seeds: int) -> str:
    return f"{low:.1%} to {high:.1%}" if seeds > 1 else "one seed"


def _uploaded(document: Document) -> dict[str, dict[str, float]]:
    return {name.removeprefix("upload "): up for name, up in document["figures"].items() if name.startswith("upload ")}


def _measured(document: Document) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Return the cells by (arm, H, data)."""
    found = {}
    for name, cell in document["figures"].items():
        if not name.startswith("upload "):
            arm, h, kind = name.rsplit(", ", 2)
            found[arm, int(h.removeprefix("H = ")), kind] = cell
    return found


def _all(document: Document, arm: str) -> bool:
    """Return whether an arm was measured at all."""
    return arm != "rows" and any(of == arm for of, _, _ in _measured(document))


def _everywhere(document: Document, arm: str) -> bool:
    """Return whether an arm was measured at every number of local steps, or where it is worst may not be known."""
    return {str(h) for of, h, kind in _measured(document) if (of, kind) == (arm, "IID")} == set(
        document["settings"]["cycles"]
    )


def _as_dense(document: Document, arm: str) -> bool:
    """Return whether an arm was measured at about as few bits a number as it has in the demo's shapes."""
    found = [cell["fewer"] for (of, _, _), cell in _measured(document).items() if of == arm and of != "rows"]
    return bool(found) and all(0.75 < fewer / _uploaded(document)[arm]["fewer_than_rows"] < 1.33 for fewer in found)


def _least(document: Document, arm: str) -> float:
    """Return the least mean share of the gain that an arm keeps."""
    return min(float(cell["kept"][0]) for (of, _, _), cell in _measured(document).items() if of == arm)


_HEAD = """
# Wires

What a miner uploads is chosen by the run's policy (`training.codec`). Everybody judges, merges and audits the state that the
bytes decode to; [ADR 30](../adr/0030-submissions-in-a-coded-form.md) has the form. `bench.wire` prints what follows. *Kept*
is the fall of the held-out loss over that of the same seed with rows as they are, four miners, the default policy's merge,
no gate; a goal is met by what an arm keeps where it keeps least. More than 100 % is possible: what coding leaves out is
noise, too. Styles of others are their form and their feedback on this rig, not their code.
"""
_END = """
## For a run

One line of a `job.yaml`: `policies: {training: {codec: low-rank, codec_rank: 16}}`, or `policies: {merging: {step_codec:
ternary}}`; `rows` sends everything. The default is *ternary, no feedback* up and *steps in int4* down. A miner that sends what
coding left out a cycle later is late by that cycle.
[Every number](../evidence/wire.json).
"""


def main() -> None:
    """Copy the documents and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.wire_page", description=__doc__)
    parser.add_argument("documents", type=Path, nargs="*", help="what the benches wrote; others stay as they are")
    for source in parser.parse_args().documents:
        shutil.copyfile(source, COPIES / source.name)
    PAGE.write_text(render(*(json.loads((COPIES / f"{name}.json").read_text()) for name in NAMES)))


if __name__ == "__main__":
    main()

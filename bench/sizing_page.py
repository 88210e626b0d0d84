"""The figures of `docs/explanation/sizing.md`, `running-costs.md` and `high-availability.md`:
`python -m bench.sizing_page OUT/starting.json OUT/control_plane.json`.

Copies either document, or both, to `docs/evidence` and writes the pages' parts anew, so that no figure there is typed. A unit
test renders them again from the copies.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from connito.render.formats import count

from bench.chaos import MOST_ENDS, NOT_ENDED, SINGLE
from bench.evidence import COPIES, ROOT, Document, paragraphs, table

PAGE = ROOT / "docs/explanation/sizing.md"
COSTS = ROOT / "docs/explanation/running-costs.md"
AVAILABILITY = ROOT / "docs/explanation/high-availability.md"
END = "<!-- until here -->\n"
# Miners, and CPU seconds of a cycle of theirs.
FAR, GOAL = 10_000, 60
# Minutes of a cycle, days of a month, and copies of each stream, of the page on costs.
CYCLE, MONTH, COPIES_OF_STREAMS = 10, 30, 3
# Parts of the storms that are held beside each other, and what befell a run, in words.
CLUSTER = ("cluster calm", "cluster")
KINDS = {
    "kill": "a process killed", "stop": "one stopped for seconds", "everything": "all killed at once", "full": "the disk full",
    "rot": "a bit flipped in the cache", "lost": "an object gone for a while",
}  # fmt: skip


def render(page: str, document: Document, parts: Mapping[str, Callable[[Document], str]] | None = None) -> str:
    """Return the page with a document's part, one of `PARTS` unless others are given, written anew."""
    name = document["name"]
    begin = f"<!-- {name}, written by bench.sizing_page -->\n"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    return before + begin + "\n" + paragraphs((PARTS if parts is None else parts)[name](document)) + "\n" + END + after


def _cycles(document: Document) -> str:
    machine, rows = document["machine"], document["rows"]
    sizes = sorted({row["miners"] for row in rows})
    # Of each size the last cycle: in the first one a start still shows.
    last = [max((row for row in rows if row["miners"] == size), key=lambda row: row["cycle"]) for size in sizes]
    parts = ("coordinator", "committer", "broker", "store")
    lines = [
        [
            f"{row['miners']:,}",
            *(f"{row[f'{part}_cpu_s']:.2f}" for part in parts),
            f"{1000 * row['cpu_s'] / row['miners']:.0f} ms",
            f"{row['in_msgs'] / row['miners']:.0f}",
            f"{row['out_bytes'] / row['miners'] / 1000:.0f} kB",
            f"{row['coordinator_rss_mb']}, {row['committer_rss_mb']} MB",
            f"{row['miner_reads_messages']:,} of {row['stands_messages']:,}",
            f"{row['miner_reads_bytes'] / 1000:,.0f} of {row['stands_bytes'] / 1000:,.0f} kB",
        ]
        for row in last
    ]
    head = (
        "miners",
        *parts,
        "a miner",
        "asked a miner",
        "sent a miner",
        "coordinator, committer",
        "a miner reads",
        "bytes",
    )
    note = document["settings"].get("note", "")
    return f"""
`bench.control_plane`: CPU seconds that a cycle costs each process, with played people and submissions of 8 kB, on
{machine["cores"]} cores of an {machine["cpu"]}{note and ", "}{note}. Miners share one connection to the broker.

{table(head, lines)}
{_far(last, document["figures"])} *Asked* and *sent* are messages into the broker and bytes out of it. What *a miner reads* is of
what stands in the streams that it reads from. [Every number](../evidence/control_plane.json).
"""


def _month(document: Document) -> str:
    cycles, machine = MONTH * 24 * 60 // CYCLE, document["machine"]
    last = {row["miners"]: row for row in sorted(document["rows"], key=lambda row: row["cycle"])}
    lines = [
        [
            f"{miners:,}",
            *(
                f"{row[f'{part}_cpu_s'] * cycles / 3600:.1f}"
                for part in ("coordinator", "committer", "broker", "store")
            ),
            f"{row['in_bytes'] * cycles * COPIES_OF_STREAMS / 1e9:.1f} GB",
            f"{row['out_bytes'] * cycles / 1e9:.1f} GB",
        ]
        for miners, row in sorted(last.items())
    ]
    return f"""
One run that never stops, cycles of {CYCLE} minutes, {MONTH} days: {cycles:,} cycles. Hours of one core of an
{machine["cpu"]} by `bench.control_plane`; disk of NATS with {COPIES_OF_STREAMS} copies of each stream, at most; bytes out
of NATS:

{table(("miners", "coordinator", "committer", "NATS", "store", "disk of NATS", "out of NATS"), lines)}
"""


def _far(last: list[dict[str, Any]], figures: dict[str, Any]) -> str:
    """Return how CPU seconds grow at the far end, and what that makes of the goal."""
    sizes = [row["miners"] for row in last]
    slope = figures[f"exponent_cpu_s_{sizes[-2]}_{sizes[-1]}"]
    seconds = last[-1]["cpu_s"] * (FAR / sizes[-1]) ** max(1.0, slope)
    verdict = "met" if seconds <= GOAL else "missed"
    kind = "measured" if sizes[-1] == FAR else "by that exponent, or 1 where it is less,"
    parts = sorted(("coordinator", "committer", "broker", "store"), key=lambda part: -last[-1][f"{part}_cpu_s"])
    shares = ", ".join(f"{part} {100 * last[-1][f'{part}_cpu_s'] / last[-1]['cpu_s']:.0f} %" for part in parts)
    if seconds > GOAL:
        verdict += f" by a factor of {seconds / GOAL:.1f}"
    return f"""From {sizes[-2]:,} to {sizes[-1]:,} miners CPU seconds grow with the power {slope:.2f} of their number. For {FAR:,}
that is {seconds:.0f} CPU seconds a cycle {kind} where {GOAL} are the goal: {verdict}. They go to: {shares}."""


def _start(found: Document) -> str:
    """Return seconds of the clock and, where they were measured, of the processor, and memory at the end and at most."""
    cpu = f" ({found['cpu_s']:.1f} CPU)" if "cpu_s" in found else ""
    peak = f" (at most {found['peak_mb']:.0f})" if found.get("peak_mb", 0) > found["rss_mb"] + 1 else ""
    return f"{found['seconds']:.1f} s{cpu}, {found['rss_mb']:.0f} MB{peak}"


def _starts(document: Document) -> str:
    settings, machine, rows = document["settings"], document["machine"], document["rows"]
    lines = [
        [
            row["service"],
            str(row["miners"]),
            str(row["cycles"]),
            str(row["messages"]),
            *(_start(row[start]) for start in ("first", "again")),
            f"{row['kept_mb']:.1f} MB",
        ]
        for row in sorted(rows, key=lambda row: (row["service"], row["miners"], row["cycles"]))
    ]
    each = [row["kept_mb"] * 1e6 / row["messages"] for row in rows if row["cycles"] >= 100]
    note = document["settings"].get("note", "")
    return f"""
`bench.starting`: seconds and memory until a service is ready, {settings["validators"]} validators,
{machine["cores"]} cores of an {machine["cpu"]}{note and ", "}{note}. *First* reads and verifies the whole log;
*again* begins with what the first has kept in `CONNITO_STATE_DIR`, and most of it is the interpreter's own start.

{table(("service", "miners", "cycles", "messages", "first", "again", "kept"), lines)}
What is kept takes {min(each, default=0):.0f} to {max(each, default=0):.0f} bytes for each message of the log.
[Every number](../evidence/starting.json).
"""


def main() -> None:
    """Copy the documents and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.sizing_page", description=__doc__)
    parser.add_argument("documents", nargs="+", type=Path)
    for path in parser.parse_args().documents:
        document = json.loads(path.read_text())
        shutil.copyfile(path, COPIES / f"{document['name']}.json")
        for page, parts in PAGES:
            if document["name"] in parts:
                page.write_text(render(page.read_text(), document, parts))


def _change(number: float) -> str:
    """Return a rounded number with its sign; none of nothing."""
    return f"{round(number):+,}".replace("-", "−") if round(number) else "0"


def _soak(document: Document) -> str:
    settings, machine, rows, found = document["settings"], document["machine"], document["rows"], document["figures"]
    at = [rows[round(share * (len(rows) - 1))] for share in (0.1, 0.25, 0.5, 0.75, 1.0)]
    lines = [
        *(
            [f"`{name}/`", *(f"{row['disk'][name] / 1e6:.1f}" for row in at), _change(found["disk_kb_a_cycle"][name])]
            for name in rows[-1]["disk"]
        ),
        [
            "memory of all processes",
            *(f"{sum(row['memory'].values()) / 1e6:.0f}" for row in at),
            _change(sum(found["memory_kb_a_cycle"].values())),
        ],
    ]
    head = ("MB in", *(f"cycle {row['cycle']}" for row in at), "kB a cycle, last half")
    note = settings.get("note", "")
    audit = "The audit afterwards says *same*." if not found["wrong"] else "The audit afterwards found a difference."
    return f"""
`bench.soak`: `connito up` on the tiny base, {settings["miners"]} miners and {settings["validators"]} validators,
artifacts of the last {settings["kept"]} cycles kept, {found["cycles"]} cycles of {found["seconds_a_cycle"]:.1f} s,
seed {settings["seed"]}, {machine["cores"]} cores of an {machine["cpu"]}{note and ", "}{note}.

{table(head, lines)}
{audit} [Every number](../evidence/soak.json).
"""


def _peers(document: Document) -> str:
    settings, machine = document["settings"], document["machine"]
    versions = " and ".join(
        f"{label} {settings['versions'][name]}" for label, name in (("Flower", "flwr"), ("NVFlare", "nvflare"))
    )
    lines = [
        [
            f"{row['megabytes']} MB, {row['who']}",
            f"{row['seconds']:.2f}",
            f"{row['slowest']:.2f}",
            f"{row['cpu']:.2f}",
            f"{row['memory'] / 1e9:.2f}",
            f"{row['loopback'] / 1e6:.1f}",
            f"{row['upload'] / 1e6:.2f}",
        ]
        for row in document["rows"]
    ]
    note = settings.get("note", "")
    head = ("payload, who", "a round, s", "slowest, s", "CPU s", "memory, GB", "loopback, MB", "an upload, MB")
    return f"""
`bench.peers`: {settings["workers"]} workers, {settings["rounds"] - 1} rounds after the first, all in one run on
{machine["cores"]} cores of an {machine["cpu"]}{note and ", "}{note},
beside {versions}. There a client hands back the numbers that it was sent
and the server averages them; *tuned* looks for work every {1000 * settings["poll_seconds"]:.0f} ms. Here a round is a whole
cycle: a step of training, commitment, reveal, scoring, merge and gate. *Raw* uploads float32 rows, *coded* the code that is
the default.

{table(head, lines)}

{_slower(document)} [Every number](../evidence/peers.json).
"""


def _slower(document: Document) -> str:
    """Return how many times as long a round takes here as the fastest peer's, for each payload."""
    rows, said = document["rows"], []
    for size in sorted({row["megabytes"] for row in rows}):
        of = {row["who"]: row["seconds"] for row in rows if row["megabytes"] == size}
        here = min(seconds for who, seconds in of.items() if who.startswith("here"))
        peer = min((who for who in of if not who.startswith("here")), key=lambda who: of[who])
        said.append(f"{here / of[peer]:.1f} times as long as {peer.replace(', ', ' ')} with {size} MB")
    return f"A round here takes {', '.join(said)}."


def _storms(document: Document) -> str:
    machine, found, rows = document["machine"], document["storms"], document["rows"]
    note = document["settings"].get("note", "")
    kinds = ", ".join(f"{count} × {KINDS[kind]}" for kind, count in sorted(found["by_kind"].items()))
    rates = [
        [
            str(seed),
            *(f"{of[part]['seconds_a_cycle']:.1f}" for part in CLUSTER),
            str(sum(of[CLUSTER[1]]["faults"].values())),
        ]
        for seed in sorted({row["seed"] for row in rows if row["part"] == CLUSTER[1]})
        if (of := {row["part"]: row for row in rows if row["seed"] == seed})
    ]
    unended = [row for row in rows if not row["ended"]]
    wrong = sum(any(not text.startswith(NOT_ENDED) for text in row["wrong"]) for row in rows)
    alone = [row for row in rows if row["part"] == SINGLE]
    waits = sorted(wait for row in alone for wait in row["waits"])
    slowest = max(slow for row in alone for slow in row["slowest"])
    return f"""
`bench.chaos` on {machine["cores"]} cores of an {machine["cpu"]}{note and ", "}{note}: `connito up` on the tiny base.
{count(found["runs"], "storm")} of {found["cycles"]} cycles held {count(found["faults"], "fault")} ({kinds}), one every second and
a half. Something was lost, done twice or different by the audit in {wrong or "none"}. {found["ended"]} of them ended their run.
`connito up` gave up {count(found["commands_that_ended"], "time")} and was started again; after {MOST_ENDS} times within a run it
was not, which leaves {count(len(unended), "run")} open. It gives up on a process that is killed six times within half a minute.

One process was killed after the other, any of them, {count(len(waits), "time")}, each within three seconds of the log having gone
on. It went on after {waits[len(waits) // 2]:.1f} s in the median, {waits[int(0.99 * len(waits))]:.1f} s at the 99th percentile
and {slowest[0]:.1f} s at most, when `{slowest[1]}` was killed. The goals were one second and five.

Three nodes with three copies of every stream, and one of them killed every {document["settings"]["node_every"]:.0f} s:

{table(("seed", "s a cycle, nobody killed", "s a cycle, one killed after the other", "kills"), rates)}
The goal, half the undisturbed rate, is missed: with a leader its streams stand still for the four to nine seconds that
NATS waits before it elects another one, and a cycle of the tiny base is shorter than that.
[Every number](../evidence/chaos.json).
"""


def _seeds(document: Document) -> str:
    found, machine = document["figures"], document["machine"]
    wrong = (
        f"in {len(found['wrong'])} of them: seeds {', '.join(found['wrong'])}" if found["wrong"] else "in none of them"
    )
    return f"""
`bench.simulate`: {count(found["next"], "simulated storm")} with {found["faults"]:,} faults, {found["kills"]:,} of them kills,
over {found["virtual_s"] / 3600:,.0f} virtual hours, in {found["cpu_s"] / 60:.0f} minutes of a core of an {machine["cpu"]}.
Something was wrong {wrong}. The goal was 10,000. [Every number](../evidence/simulate.json).
"""


PARTS = {"starting": _starts, "control_plane": _cycles, "soak": _soak, "peers": _peers}
COST_PARTS = {"control_plane": _month}
AVAILABILITY_PARTS = {"chaos": _storms, "simulate": _seeds}
PAGES = ((PAGE, PARTS), (COSTS, COST_PARTS), (AVAILABILITY, AVAILABILITY_PARTS))

if __name__ == "__main__":
    main()

"""The rates of `docs/explanation/attacks.md`: `python -m bench.attacks_page --from OUT/work_rates.json`.

Copies the document to `docs/evidence` and writes the page's part anew, so that no rate there is typed. A unit test renders
it again from the copy.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.evidence import COPIES, ROOT, Document, paragraphs, table
from bench.work_kinds import COPIES as KINDS_OF_COPIES
from bench.work_kinds import PARTLY
from bench.work_rates import WORLDS

PAGE, EVIDENCE = ROOT / "docs/explanation/attacks.md", COPIES / "work_rates.json"
BEGIN, END = "<!-- rates, written by bench.attacks_page -->\n", "<!-- until here -->\n"
GOALS = {"copies": 0.99, "partly own work": 0.95}
ACCUSED_GOAL = 0.001


def render(page: str, document: Document) -> str:
    """Return the page with its part written anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + paragraphs(_part(document)) + "\n" + END + after


def _part(document: Document) -> str:
    settings, rows = document["settings"], document["rows"]
    honest = [row for row in rows if row["kind"] == "honest"]
    lines = [
        [kind, *(_cell([row for row in rows if (row["kind"], row["world"]) == (kind, world)]) for world in WORLDS)]
        for kind in (*KINDS_OF_COPIES, *PARTLY)
    ]
    families = [
        f"{name}: {_rate(chosen, 'found_or_unpaid')}, goal {goal:.0%}, {_met(chosen, goal)}"
        for (name, goal), kinds in zip(GOALS.items(), (KINDS_OF_COPIES, PARTLY), strict=True)
        if (chosen := [row for row in rows if row["kind"] in kinds])
    ]
    shown = _interval(honest, "found")[2] <= ACCUSED_GOAL
    return f"""
{settings["pools"]} pools on {settings["bases"]} bases, {" and ".join(map(str, settings["steps"]))} local steps, the domains
{" and ".join(settings["domains"])}, {" to ".join(str(count) for count in (min(settings["company"]), max(settings["company"])))}
honest miners beside each thief; {document["machine"]["cpu"]}, {document["machine"]["cores"]} cores. Each cell: found or
unpaid, with the 95 % Wilson interval over works that differ, then what the thief earned, an honest miner of the same cycles
being 1.

{table(("handed in", *WORLDS), lines)}

Together found or unpaid: {"; ".join(families)}.

Honest hand-ins called a copy: {"; ".join(f"{row['world']} {_rate([row], 'found')}" for row in honest)}; together
{_rate(honest, "found")}, goal at most {ACCUSED_GOAL:.1%}, {"shown" if shown else "not shown by so many"}. Paid a part:
{"; ".join(f"{row['world']} {row['paid_in_part']} (paid {row['share']:.1%} on average)" for row in honest)}.
"""


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "–"
    return f"{_rate(rows, 'found_or_unpaid')}; {sum(row['earned'] for row in rows) / len(rows):.2f}"


def _rate(rows: Sequence[dict[str, Any]], what: str) -> str:
    share, low, high = _interval(rows, what)
    return f"{share:.1%} ({low:.1%} to {high:.1%} of {sum(row['hand_ins'] for row in rows)})"


def _interval(rows: Sequence[dict[str, Any]], what: str) -> tuple[float, float, float]:
    """Return a share with its interval. Hand-ins of one work are one observation: they count by their mean."""
    from scipy.stats import binomtest

    trials, works = sum(row["hand_ins"] for row in rows), sum(row["works"] for row in rows)
    share = sum(row[what] for row in rows) / trials
    # Wilson's interval at the whole numbers around a share that need not be one of `works`.
    low = binomtest(int(share * works), works).proportion_ci(method="wilson").low
    high = binomtest(min(works, -int(-share * works // 1)), works).proportion_ci(method="wilson").high
    return share, low, high


def _met(rows: Sequence[dict[str, Any]], goal: float) -> str:
    share = sum(row["found_or_unpaid"] for row in rows) / sum(row["hand_ins"] for row in rows)
    return "met" if share >= goal else f"missed by {goal - share:.1%}"


def main() -> None:
    """Read the command line, copy and render."""
    parser = argparse.ArgumentParser(prog="python -m bench.attacks_page", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="what bench.work_rates wrote")
    shutil.copyfile(parser.parse_args().source, EVIDENCE)
    PAGE.write_text(render(PAGE.read_text(), json.loads(EVIDENCE.read_text())))


if __name__ == "__main__":
    main()

"""The figures of `docs/explanation/sizing.md`: `python -m bench.sizing_page --from OUT/starting.json`.

Copies the document to `docs/evidence` and writes the page's part anew, so that no figure there is typed. A unit test renders
it again from the copy.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from bench.evidence import COPIES, ROOT, Document, paragraphs, table

PAGE, EVIDENCE = ROOT / "docs/explanation/sizing.md", COPIES / "starting.json"
BEGIN, END = "<!-- starts, written by bench.sizing_page -->\n", "<!-- until here -->\n"


def render(page: str, document: Document) -> str:
    """Return the page with its part written anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + paragraphs(_part(document)) + "\n" + END + after


def _part(document: Document) -> str:
    settings, machine, rows = document["settings"], document["machine"], document["rows"]
    lines = [
        [
            row["service"],
            str(row["cycles"]),
            str(row["messages"]),
            *(f"{row[start]['seconds']:.1f} s, {row[start]['rss_mb']:.0f} MB" for start in ("first", "again")),
            f"{row['kept_mb']:.1f} MB",
        ]
        for row in sorted(rows, key=lambda row: (row["service"], row["cycles"]))
    ]
    each = [row["kept_mb"] * 1e6 / row["messages"] for row in rows if row["cycles"] >= 100]
    note = document["settings"].get("note", "")
    return f"""
`bench.starting`: seconds and memory until a service is ready, {settings["miners"]} miners, {settings["validators"]}
validators, {machine["cores"]} cores of an {machine["cpu"]}{note and ", "}{note}. *First* reads and verifies the whole log;
*again* begins with what the first has kept in `CONNITO_STATE_DIR`, and most of it is the interpreter's own start.

{table(("service", "cycles", "messages", "first", "again", "kept"), lines)}
What is kept takes {min(each, default=0):.0f} to {max(each, default=0):.0f} bytes for each message of the log.
[Every number](../evidence/starting.json).
"""


def main() -> None:
    """Copy the document and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.sizing_page", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, default=Path("out/bench/starting.json"))
    shutil.copyfile(parser.parse_args().source, EVIDENCE)
    PAGE.write_text(render(PAGE.read_text(), json.loads(EVIDENCE.read_text())))


if __name__ == "__main__":
    main()

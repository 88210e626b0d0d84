"""The figures of `docs/explanation/attacks.md`: `python -m bench.attacks_page --from OUT/work_rates.json`, of lies about tokens
with `--claims OUT/claim_lies.json`, of earlier works with `--again`, of merges by expert with `--merges`,
of harm within chance with `--drift`, of backdoors with `--triggers`.

Copies the document to `docs/evidence` and writes the page's part anew, so that no rate there is typed. A unit test renders
it again from the copy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.evidence import COPIES, ROOT, Document, paragraphs, table
from bench.trigger import ATTACKERS, CAREFUL, SCREENED, SCREENS, screen
from bench.work_kinds import COPIES as KINDS_OF_COPIES
from bench.work_kinds import PARTLY
from bench.work_rates import ALONE, WORLDS

PAGE, EVIDENCE = ROOT / "docs/explanation/attacks.md", COPIES / "work_rates.json"
CLAIMS, LIES = "<!-- claims, written by bench.attacks_page -->\n", COPIES / "claim_lies.json"
AGAIN, WORKS_AGAIN = "<!-- again, written by bench.attacks_page -->\n", COPIES / "work_again.json"
HIDDEN, TRIGGERS = "<!-- triggers, written by bench.attacks_page -->\n", COPIES / "trigger.json"
FRAMED = ("framed a cycle ahead", "framed in the same cycle")
DRIFTS, DRIFT = "<!-- drift, written by bench.attacks_page -->\n", COPIES / "gate_drift.json"
MERGES, MERGE_LIES = "<!-- merges, written by bench.attacks_page -->\n", COPIES / "merge_lies.json"
BEGIN, END = "<!-- rates, written by bench.attacks_page -->\n", "<!-- until here -->\n"
GOALS = {"copies": 0.99, "partly own work": 0.95}
ACCUSED_GOAL = 0.001


def render(page: str, document: Document) -> str:
    """Return the page with its part written anew."""
    return _between(page, BEGIN, _part(document))


def _between(page: str, begin: str, text: str) -> str:
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    return before + begin + "\n" + paragraphs(text) + "\n" + END + after


def _part(document: Document) -> str:
    settings, rows = document["settings"], document["rows"]
    honest = [row for row in rows if row["kind"] == "honest"]
    worlds = [world for world in WORLDS if any(row["world"] == world for row in rows)]
    alone = [row for row in rows if row["kind"] == ALONE]
    lines = [
        [kind, *(_cell([row for row in rows if (row["kind"], row["world"]) == (kind, world)]) for world in worlds)]
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

{table(("handed in", *worlds), lines)}

Together found or unpaid: {"; ".join(families)}.

Honest hand-ins called a copy, or paid nothing: {"; ".join(f"{row['world']} {_rate([row], 'found')}" for row in honest)}; together
{_rate(honest, "found")}, goal at most {ACCUSED_GOAL:.1%}, {"shown" if shown else "not shown by so many"}. Paid a part:
{"; ".join(f"{row['world']} {row['paid_in_part']} (paid {row['share']:.1%} on average)" for row in honest)}.
{_alone(alone)}"""


def _alone(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    told = "; ".join(f"{_rate([row], 'found')}, paid {row['share']:.1%} on average" for row in rows)
    return f"\nA niche expert alone, the one miner of its domain: called a copy, or paid nothing {told}.\n"


def render_claims(page: str, document: Document) -> str:
    """Return the page with its part on claims of routed tokens written anew."""
    settings, found = document["settings"], document["figures"]
    lines = [
        [name, one["found"], *(_mean(one[what]) for what in ("share", "most", "rise", "judged"))]
        for name, one in found.items()
        if isinstance(one, dict)
    ]
    text = f"""
`bench.claim_lies`: {settings["miners"]} miners of one domain each, {settings["local_steps"]} local steps,
{settings["seeds"]} bases whose experts differ; liars hand in noise that validators are taken to have let pass. *Found*: liars
that a recount calls so. *Share* and *most*: the liars' share of the merge, over experts and of one; *rise*: of the loss, over
the same merge with true claims; *judged*: of the loss that validators measure of a liar's own state, by what it claims. What
does not lower that loss significantly is not paid.

{table(("lie, liars, weighting", "found", "share", "most", "rise (nats per token)", "judged"), lines)}
Honest claims, by miners with two frozen helpers a layer, differ from the recount by at most
{found["honest claims apart at most"]:.0%} of a layer's tokens; {settings["margin"]:.0%} may in the first adapted layer, twice
that in the second. Under `capped` nobody recounts: what would have been found is shown for comparison.
"""
    return _between(page, CLAIMS, text)


def render_again(page: str, document: Document) -> str:
    """Return the page with its part on works of earlier cycles written anew."""
    settings, found = document["settings"], document["figures"]
    worlds = list(found["honest"])
    lines = [
        [kind, *(_of(*found[kind][world]) for world in worlds)] for kind in found if kind not in ("honest", *FRAMED)
    ]
    framed = "; ".join(f"{kind} {_of(*map(sum, zip(*found[kind].values(), strict=True)))}" for kind in FRAMED)
    honest = [sum(found["honest"][world][part] for world in worlds) for part in (0, 1)]
    text = f"""
`bench.work_again`: {settings["miners"]} honest miners of the domains {" and ".join(settings["domains"])} train
{settings["cycles"]} cycles of {settings["local_steps"]} steps on {_bases(settings["seeds"])}. From the second on
works of the one before are handed in again on the state of now, by a thief and by the miner whose they were. They read fresh
text in each cycle, their own text again, or all the same six answers. Each cell: found, with the 95 % Wilson interval;
hand-ins of one base are not independent.

{table(("handed in again", *worlds), lines)}
Honest hand-ins of the same cycles called one of an earlier: {_of(*honest)}. Honest hand-ins called a copy where
somebody else had trained from their text, and committed that first: {framed}. No miner or validator can know a miner's text
of a cycle ahead. The operator, who writes the head that draws it, knows it first, before the cycle opens
([ADR 49](../adr/0049-earlier-cycles-are-earlier.md)).
"""
    return _between(page, AGAIN, text)


def render_merges(page: str, document: Document) -> str:
    """Return the page with its part on attacks on merges by expert written anew."""
    settings, found = document["settings"], document["figures"]
    lines = [
        [
            name, one["found"], str(one["merged"]), "–" if one["earned"] is None else f"{one['earned']:.2f}", one["gate"],
            *(_mean(one[what]) for what in ("gained", "rise", "general")),
        ]
        for name, one in found.items()
    ]  # fmt: skip
    text = f"""
`bench.merge_lies`: {settings["honest_miners"]} honest miners of one of two domains each, one cycle, {_bases(settings["seeds"])}
with experts that differ; after each attack the local steps of the cycle. Attackers commit last and know what the others made,
and what they claim is taken as true. *Found*: refused, for whatever reason; *merged*: hand-ins of attackers in the published
versions; *earned*: an honest miner's mean being 1; *gained*: fall of the published target loss by the cycle, in nats per
token; *rise* of it, and of the *general* domains', by the attack.

{table(("attack; steps", "found", "merged", "earned", "gate", "gained", "rise", "general"), lines)}
"""
    return _between(page, MERGES, text)


def render_drift(page: str, document: Document) -> str:
    """Return the page with its part on merges that harm within what the gate takes for chance written anew."""
    settings, found = document["settings"], document["figures"]
    tried = dict.fromkeys((row["kind"], row["rule"]) for row in document["rows"])
    lines = [[*one, *(_mean(found[f"{', '.join(one)}: {part}"]) for part in ("gate", "report"))] for one in tried]
    seeds = settings["seeds_named"]
    text = f"""
`bench.gate_drift`: {settings["cycles"]} cycles on {_bases(len(seeds))}, the seeds {", ".join(map(str, seeds))}, named before
their first run. Nothing but the gate holds the attacker back: it makes the merge as it likes, knows the rule and the gate's
{settings["sequences"]} sequences, and takes the furthest step that passes. *Strict* refuses every rise; *forgetful* one
beyond chance, against the incumbent alone; *landed* is the default, with a margin of {settings["margin"]} nats per token and
the best version so far. Shown is how far the loss lay above the first version's where it was highest, in nats per token: on
the gate's own text and on text that decides nothing.

{table(("what is done", "rule", "gate", "other text"), lines)}
"""
    return _between(page, DRIFTS, text)


def render_triggers(page: str, document: Document) -> str:
    """Return the page with its part on backdoors that wait for a trigger written anew."""
    settings, found = document["settings"], document["figures"]
    lines = [
        [
            name, one["told"], "–" if one["earned"] is None else f"{one['earned']:.2f}",
            *(_mean(one[what]) for what in ("weight", "gained", "alone", "merged")),
        ]
        for name in ATTACKERS
        if name in found
        for one in [found[name]]
    ]  # fmt: skip
    screens = [
        [name, _of(*found[name]["attacker"]), _of(*found[name]["honest"]), _mean(found[name]["ratio"])]
        for attacker, kind, sign in itertools.product(SCREENED, SCREENS, ("most", "spiked"))
        for name in [screen(attacker, kind, sign)]
        if name in found
    ]
    told = "A *careful* attacker also trains on other rare tokens with what usually follows."
    careful = told if CAREFUL in found else ""
    text = f"""
`bench.trigger`: {settings["honest_miners"]} honest miners and one that plants a trigger of {settings["trigger"]} rare tokens,
with a payload of {settings["payload"]} behind it, in half of its text; {_bases(settings["seeds"])}, {settings["cycles"]} cycles.
The payload costs {_mean(found["payload in the base"])} nats per token in the base; the table has what it costs in the
attacker's own state (*alone*) and in the published one after the last cycle (*merged*), by aggregator, with the attacker's
share of the merges (*weight*) and what the published target loss *gained* a cycle. {careful}

{table(("aggregator", "told", "earned", "weight", "gained", "alone", "merged"), lines)}

Screens compare each submission's change of the next token's distribution with the base's, on {settings["contexts"]} drawn
contexts. *Most*: its largest is more than twice that of every other's; *spiked*: its largest over its mean is. *Ratio*: the
attacker's value over the largest of the others'. Nobody who screens is *knowing*: those contexts hold the trigger.

{table(("screen, contexts", "attackers called out", "honest called out", "ratio"), screens)}
"""
    return _between(page, HIDDEN, text)


def _bases(count: int) -> str:
    return "one base" if count == 1 else f"{count} bases"


def _of(hits: int, trials: int) -> str:
    from scipy.stats import binomtest

    found = binomtest(hits, trials).proportion_ci(method="wilson")
    return f"{hits} of {trials} ({found.low:.1%} to {found.high:.1%})"


def _mean(one: Sequence[float]) -> str:
    mean, low, high = (f"{value:.3f}".replace("-", "−") for value in one)
    return f"{mean} ({low} to {high})"


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
    parser.add_argument("--from", dest="source", type=Path, help="what bench.work_rates wrote")
    parser.add_argument("--claims", type=Path, help="what bench.claim_lies wrote")
    parser.add_argument("--again", type=Path, help="what bench.work_again wrote")
    parser.add_argument("--triggers", type=Path, help="what bench.trigger wrote")
    parser.add_argument("--drift", type=Path, help="what bench.gate_drift wrote")
    parser.add_argument("--merges", type=Path, help="what bench.merge_lies wrote")
    arguments = parser.parse_args()
    parts = (
        (arguments.source, EVIDENCE, render),
        (arguments.claims, LIES, render_claims),
        (arguments.again, WORKS_AGAIN, render_again),
        (arguments.merges, MERGE_LIES, render_merges),
        (arguments.drift, DRIFT, render_drift),
        (arguments.triggers, TRIGGERS, render_triggers),
    )
    for source, kept, part in parts:
        if source is not None:
            shutil.copyfile(source, kept)
            PAGE.write_text(part(PAGE.read_text(), json.loads(kept.read_text())))


if __name__ == "__main__":
    main()

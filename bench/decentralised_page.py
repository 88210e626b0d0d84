"""The part of the page of evidence on several miners (`bench.evidence`), from what `bench.decentralised` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def decentralised(document: Mapping[str, Any]) -> str:
    """Return the section."""
    found, settings = document["figures"], document["settings"]
    policy, goal = settings["default"], settings["goal"]
    return f"""
## The same tokens with several miners

`bench.decentralised`: {settings["steps"]} local steps a miner of {settings["batch_sequences"]} sequences, in cycles of H;
*kept* is the fall of the loss over that of one AdamW run with as many steps, each on the batches of all miners together, and
over that of one with as many tokens in batches of one miner's size; of each the better of a rate that stays and one that
falls. *Of a rate that stays* is over the first at the miners' rate, held constant, *of Muon's* over a run of Muon
with as many steps; a dash was not measured. *Default, Muon* is the default with `training.optimizer: muon`; how long its
steps are for each expert was chosen on pilot seeds after these had been measured once ([notes](lab-notes.md)). Reported are
the seeds {_list(settings["seeds_reported"])} by the gate of now, and {_list(settings["seeds_by_the_strict_gate"])} by the one
before it, all named before their first run; rates and rules were chosen on {_list(settings["seeds_tuned_on"])}.
*Default* is a run whose policy says nothing: its merge (`{policy["aggregator"]}`, weighted by `{policy["weighting"]}`) behind its
rules. Of the merge with and the merge without what does not lower the loss of all domains, each expert taken as far as the
miner's text uses it ([why](../adr/0037-judged-as-merged.md)), the gate takes the better one
([why](../adr/0045-what-gains-only-together.md)).
The gate refuses a rise beyond chance ([why](../adr/0053-the-gate-allows-for-chance.md)). *Strict gate* is the default as it was
before, when the gate refused every rise. Where a cell has no row without *strict gate*, it was not measured by the rule
of now.
*Gainers alone* has only the merge without, behind the strict gate, as *judged whole*; *judged whole* has every
submission judged as it is, as in runs of before;
*unjudged* merges everybody without a gate, and so do all other arms.

{_table(_HEAD, _kept(found))}
{_goal(found, goal)}

{_pairs(found)}The longer a cycle is, the fewer merges there are of the same steps for momentum to build up in,
whatever the data, and with one domain a miner states drift apart as well. On two pilot seeds no rate, momentum, β or
schedule that was tried kept more of IID data in five merges; in twenty merges as long nothing was lost against a rate
that stays. In cycles of one step outer momentum adds up to many steps, so that a miner's rate has to be lower
([notes](lab-notes.md)): a quarter of the others', by two pilot seeds. The strict rows of one step are of the higher rate,
and three of the cells of now had been run with it before. The platform shares out one corpus, which is the IID case.

{len(document["rows"])} measurements on {document["machine"]["cores"]} cores of an {document["machine"]["cpu"]}, no GPU. What
is not in the table has not been measured. [Every number](../evidence/decentralised.json).

![decentralised](../evidence/decentralised.svg)
"""


def on_demo_base(document: Mapping[str, Any]) -> str:
    """Return the section on the demo base."""
    settings, machine = document["settings"], document["machine"]
    tried = [row["tried"] for row in document["rows"] if (row["data"], row["arm"]) == ("central", "steps")]
    rates = settings["setting"]["central"]["steps"]
    best = [max(range(len(rates)), key=lambda place: one[place]["gain"]) for one in tried]
    highest = max(range(len(rates)), key=lambda place: rates[place][0])
    edge = (
        f"Central was best at the highest rate that was tried, {rates[highest][0]:g} falling to {rates[highest][1]:g} of it, on "
        f"{sum(place == highest for place in best)} of {len(best)} seeds; miners were given one rate, the demo's. "
    )
    return f"""
## The same on the demo base

`bench.decentralised_demo`: 274 million parameters and real text, {", ".join(settings["setting"]["domains"])} at once,
{settings["setting"]["per_layer"]} experts a layer, {settings["steps"]} steps a miner of {settings["batch_sequences"]} sequences.
Seeds, named before their first run: {_list(settings["seeds_named"])}.

{_table(_HEAD, _kept(document["figures"]))}
{edge}What is not in the table was not reached in the time that there was on a GPU.

{len(document["rows"])} measurements, ten processes at a time on an {machine["gpu"]}. [Every
number](../evidence/decentralised_demo.json).
"""


_HEAD = (
    "data, miners, steps a cycle, arm",
    "kept at equal steps",
    "of a rate that stays",
    "kept at equal tokens",
    "of Muon's at equal steps",
    "seeds",
)


def _kept(found: Mapping[str, Any]) -> list[list[str]]:
    arms = dict.fromkeys(key.rsplit(", equal ", 1)[0] for key in found if ", equal " in key)
    lines = []
    for name in arms:
        both = [found.get(f"{name}, equal {of}") for of in ("steps", "steps, same rate", "tokens", "steps of Muon")]
        shares = ["–" if one is None else f"{_spread(one, '.0f')} %" for one in both]
        lines.append([name, *shares, str(max(one[3] for one in both if one is not None))])
    return lines


def _goal(found: Mapping[str, Any], goal: float) -> str:
    default, strict, muon = (_shares(found, arm) for arm in ("default", "default, strict gate", "default, Muon"))
    if not default:
        return f"The goal is {100 * goal:.0f} % at equal steps, of the default, which has not been measured on other seeds."
    before = {name: share for name, share in strict.items() if name not in default}
    said = [
        ("The default meets it with", _met(default, goal)),
        ("The default misses it with", _missed(default, goal)),
        ("With Muon it meets it, of the same run of AdamW, with", _met(muon, goal)),
        ("With Muon it misses it with", _missed(muon, goal)),
        ("By the strict gate alone were measured, and meet it:", _met(before, goal)),
        ("By the strict gate alone were measured, and miss it:", _missed(before, goal)),
    ]
    sentences = [f"{begin} {'; '.join(names)}." for begin, names in said if names]
    return " ".join([f"The goal is {100 * goal:.0f} % at equal steps.", *sentences])


def _shares(found: Mapping[str, Any], arm: str) -> dict[str, float]:
    end = f", {arm}, equal steps"
    return {key.removesuffix(end): one[0] for key, one in found.items() if key.endswith(end)}


def _met(shares: Mapping[str, float], goal: float) -> list[str]:
    return [name for name, share in shares.items() if share >= goal]


def _missed(shares: Mapping[str, float], goal: float) -> list[str]:
    return [f"{name}, by {100 * (goal - share):.0f} points" for name, share in shares.items() if share < goal]


def _pairs(found: Mapping[str, Any]) -> str:
    lines = [[key, _spread(one, "+.0f")] for key, one in found.items() if key.startswith("default over ")]
    head = ("gain of the default over others in the same seeds, as a share of central's", "points")
    return f"{_table(head, lines)}\n" if lines else ""


def _spread(one: Sequence[float], how: str) -> str:
    """Return `86 (80 to 92)` from [mean, low, high, …] as shares, in points; of one seed the mean alone."""
    mean, low, high = (f"{100 * value:{how}}".replace("-", "−") for value in one[:3])
    return f"{mean} ({low} to {high})" if one[3] > 1 else mean


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from bench.evidence import table

    return table(head, rows)

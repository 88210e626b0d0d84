"""The part of the page of evidence on the pilot (`bench.evidence`), from what `bench.pilot` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

METHODS = {
    "miners": "miners, merged",
    "central": "the same experts on one machine",
    "miners by Muon": "miners, merged, steps of Muon",
    "central by Muon": "the same on one machine, steps of Muon",
    "expert-only": "the same experts, rate swept",
    "ESFT": "ESFT by its own rule",
    "LoRA experts": "LoRA on all experts",
    "LoRA attention": "LoRA on attention",
    "full": "every parameter",
}


def pilot(document: Mapping[str, Any]) -> str:
    """Return the section."""
    from bench.evidence import ran, table

    found, settings = document["figures"], document["settings"]
    sizes = "; ".join(
        f"{base}: {size['cycles']} cycles of {size['steps']} steps of {size['batch']} sequences a miner, sums of numbers below "
        f"{size['below']}"
        for base, size in settings["sizes"].items()
    )
    head = ("base, method", "its best arm", "change of loss, sums", "general", "exact, before → after", "seeds")
    return f"""
## The first claim, over many cycles

`bench.pilot`: three miners learn sums, a text that no base was made for, with one sequence in four of general text; {sizes}.
*Exact* are answers right to the last token, after the right ones before them. Other methods see the same tokens in as many steps,
each on the batches of all miners; of each the arm with the lowest mean loss of sums is shown, chosen with the reported text,
which favours methods with many arms. Seeds, named before their first run: {", ".join(map(str, settings["seeds_named"]))}.

{table(head, [line for base in settings["sizes"] for line in _best(found, base)])}
{_claims(found, list(settings["sizes"]))}{_edges(found, list(settings["sizes"]))} What is not in the table has not been measured.

{ran(document)}"""


def arms_of(found: Mapping[str, Any], base: str, method: str) -> list[str]:
    """Return the arms of a method that were measured on as many seeds as any of them."""
    names = _named(found, base, method)
    most = max((found[f"{name}: sums"][3] for name in names), default=0)
    return [name for name in names if found[f"{name}: sums"][3] == most]


def _named(found: Mapping[str, Any], base: str, method: str) -> list[str]:
    names = [key.removesuffix(": sums") for key in found if key.startswith(f"{base}, ") and key.endswith(": sums")]
    return [name for name in names if _method(name.removeprefix(f"{base}, ")) == method]


def _method(arm: str) -> str:
    """Return the method of an arm: the longest name that it begins with."""
    return max((name for name in METHODS if f"{arm} ".startswith(f"{name} ")), key=len)


def _best(found: Mapping[str, Any], base: str) -> list[list[str]]:
    lines = []
    for method, label in METHODS.items():
        arms = arms_of(found, base, method)
        if arms:
            name = min(arms, key=lambda arm: found[f"{arm}: sums"][0])
            setting = name.removeprefix(f"{base}, {method}").strip()
            of = f"{setting} ({_what(method)}), of {len(arms)}" if setting else "one rate"
            before, change = found[f"{name}: exact before"], found[f"{name}: exact"]
            lines.append(
                [f"{base}, {label}", of, _spread(found[f"{name}: sums"]), _spread(found[f"{name}: general"]),
                 f"{100 * before:.0f} → {100 * (before + change[0]):.0f} %", str(change[3])]
            )  # fmt: skip
    return lines


def _edges(found: Mapping[str, Any], bases: Sequence[str]) -> str:
    """Return which methods' best arms have the highest or lowest rate, or the highest rank, of those measured beside them."""
    said = []
    for base in bases:
        for method, label in METHODS.items():
            every = [arm.split() for arm in _named(found, base, method)]
            if len(every) < 2:
                continue
            best = min(arms_of(found, base, method), key=lambda arm: found[f"{arm}: sums"][0]).split()
            rates = [float(arm[-1]) for arm in every]
            highest = method.startswith("LoRA") and int(best[-2]) == max(int(arm[-2]) for arm in every)
            if float(best[-1]) in (min(rates), max(rates)) or highest:
                said.append(f"{base}, {label}{' (rank)' if highest else ''}")
    return f" At the edge of what was measured, so that there may be better arms: {'; '.join(said)}." if said else ""


def _what(method: str) -> str:
    return "rank, rate" if method.startswith("LoRA") else "rate"


def _claims(found: Mapping[str, Any], bases: Sequence[str]) -> str:
    said = []
    for base, by in ((base, by) for base in bases for by in ("", " by Muon")):
        kept, general = found.get(f"{base}: kept of central{by}"), found.get(f"{base}, miners{by}: general")
        if kept is None or general is None:
            continue
        interval = f" ({100 * kept[1]:.0f} to {100 * kept[2]:.0f})" if kept[3] > 1 else f" ({kept[3]} seed)"
        steps = " with steps of Muon" if by else ""
        said.append(
            f"On the {base} base miners{steps} keep {100 * kept[0]:.0f} %{interval} of what one machine gains at the same rate."
        )
        said.append(
            f"The loss of sums fell in {100 * found[f'{base}, miners{by}: cycles in which it fell']:.0f} % of the cycles."
        )
        if general[3] > 1:
            change = "cannot be told from unchanged" if general[1] <= 0 else "loses"
            said.append(f"General text {change}.")
    return " ".join(said)


def _spread(one: Sequence[float]) -> str:
    mean, low, high = (f"{value:+.3f}".replace("-", "−") for value in one[:3])
    return f"{mean} ({low} to {high})" if one[3] > 1 else mean

"""Claims of submissions about their text: how many of its tokens the router sends to each selected expert.

A merge expert by expert weighs by these numbers (`connito.protocol.merging.by_expert`), and they are a stranger's word. They
stand in the artifact's metadata, so the commitment binds them. They are about the first `CLAIMED_TOKENS` tokens of the text
that the run gave the miner, in the state that its cycle began from, with the router of the base: whoever has the base can
count them again, whatever the miner trained on. Validators do so for submissions that the seed draws, an auditor for all.

A miner's own model may hold other experts in fewer bits, or not at all, so that layers above see other states, the more of them
lie below: counts may differ by a share of the tokens that grows from layer to layer (`margin`). That is also the most a liar can
gain unseen. Calling an honest miner a liar costs it a cycle; a lie costs one merge a little.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from connito.data.packing import Rows
from connito.data.tensors import Header
from connito.errors import Invalid
from connito.protocol.policy.choices import CAPPED, TOKENS
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding
from connito.v1.run_pb2 import RunSpec, SelectionMade
from connito.wire.facts import RunFacts
from connito.wire.hashing import hash_fields

# Key of the metadata, and what is counted.
ROUTED = "routed"
CLAIMED_TOKENS = 4096
# Of the tokens, what claimed and counted numbers may differ by in the first adapted layer, and at most in later ones.
MARGIN, MOST_MARGIN = 0.1, 0.5
_TAG = b"connito.v1.claims"
# Nobody claims more digits than a number of tokens has.
_MAX_BYTES = 1 << 19

Claim = Mapping[int, Sequence[int]]
"""Tokens by layer, in the order of a state's rows."""


def claimed_rows(batches: Rows) -> Rows:
    """Return the rows [n, L + 1] of a miner's batches [H, B, L + 1] that its claim is about."""
    rows = batches.reshape(-1, batches.shape[-1])
    return rows[: max(1, CLAIMED_TOKENS // (rows.shape[1] - 1))]


def claimable(spec: RunSpec) -> int:
    """Return how many tokens a miner's claim is about at most: those that `claimed_rows` has of one cycle's batches."""
    policy = spec.training
    most = max(CLAIMED_TOKENS, policy.sequence_length)
    if not (policy.local_steps and policy.batch_sequences and policy.sequence_length):
        return most
    rows = min(policy.local_steps * policy.batch_sequences, max(1, CLAIMED_TOKENS // policy.sequence_length))
    return min(most, rows * policy.sequence_length)


def metadata_of(claim: Claim) -> dict[str, str]:
    """Return the metadata that an artifact states a claim with."""
    text = json.dumps({str(layer): list(counts) for layer, counts in sorted(claim.items())}, separators=(",", ":"))
    return {ROUTED: text}


def claim_of(header: Header, spec: RunSpec, selection: SelectionMade) -> Claim | None:
    """Return the claim of an artifact; None where it makes none, or the run asks for none.

    Raises `Invalid` (BAD_CLAIM) for anything but whole numbers of tokens, one for each row, of each layer, and for more of them
    than the text has, in a layer together than its router sends. Whoever takes part or audits asks this one rule.
    """
    text = header.metadata.get(ROUTED)
    if text is None or not by_expert(spec):
        return None
    rows = {int(name.split(".")[1]): entry.shape[0] for name, entry in header.entries.items()}
    most, each = claimable(spec), {layer.layer: layer.per_token for layer in selection.layers}
    try:
        found = json.loads(text) if len(text) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or set(found) != {str(layer) for layer in rows}:
        raise _bad(f"it has to be a JSON object with the layers {', '.join(map(str, sorted(rows)))}")
    for layer, count in rows.items():
        numbers = found[str(layer)]
        if not isinstance(numbers, list) or len(numbers) != count:
            raise _bad(f"layer {layer} needs {count} numbers, one for each selected expert")
        if not all(type(number) is int and 0 <= number <= most for number in numbers):
            raise _bad(f"layer {layer} has something else than whole numbers from 0 to {most}")
        # Selections of older programs do not say how many experts a token has.
        if each.get(layer) and sum(numbers) > most * each[layer]:
            raise _bad(f"layer {layer} has {sum(numbers)} tokens, and {most} have {each[layer]} experts each")
    return {int(layer): numbers for layer, numbers in found.items()}


def most_bytes(spec: RunSpec, selection: SelectionMade) -> int:
    """Return how many bytes of metadata a claim may need, quoted as a header has it; 0 where the run asks for none."""
    if not by_expert(spec):
        return 0
    most = max(CLAIMED_TOKENS, spec.training.sequence_length)
    longest = {layer.layer: [most] * (len(layer.experts) + len(layer.helpers)) for layer in selection.layers}
    return len(json.dumps(metadata_of(longest)))


def _bad(why: str) -> Invalid:
    return Invalid(f"the claim of routed tokens is none: {why}", reason=reasons_pb2.REASON_BAD_CLAIM, about=ROUTED)


def by_expert(spec: RunSpec) -> bool:
    """Return whether a run merges expert by expert."""
    return spec.merging.weighting in {TOKENS, CAPPED}


def counts_of(claims: Sequence[Claim | None]) -> dict[int, NDArray[np.float64]]:
    """Return claims as [n, S] by layer; nothing where nobody makes one. Who makes none counts as the mean of those who do."""
    made = [claim for claim in claims if claim is not None]
    found = {}
    for layer in sorted(made[0]) if made else ():
        mean = np.mean([claim[layer] for claim in made], axis=0)
        found[layer] = np.stack([mean if claim is None else np.asarray(claim[layer], float) for claim in claims])
    return found


def drawn_claims(facts: RunFacts, cycle: int, miners: Iterable[str]) -> frozenset[str]:
    """Return the miners whose claims every validator of theirs counts again: a share of all, drawn by the cycle's seed."""
    spec, drawn, people = facts.require_spec(), facts.drawn(cycle), sorted(set(miners))
    if spec.merging.weighting != TOKENS or drawn is None:
        return frozenset()
    lots = sorted(people, key=lambda miner: hash_fields(_TAG, drawn.seed, miner))
    return frozenset(lots[: math.ceil(spec.merging.checked_claims * len(lots))])


def falsehood(claim: Claim, counted: Claim, tokens: int) -> Finding | None:
    """Return why a claim about `tokens` tokens does not hold beside what was counted; None when it does."""
    for place, (layer, numbers) in enumerate(sorted(counted.items())):
        apart = [abs(said - found) for said, found in zip(claim[layer], numbers, strict=True)]
        if sum(apart) > margin(place) * tokens:
            worst = apart.index(max(apart))
            return Finding(
                kind=cycle_pb2.FINDING_KIND_FALSE_CLAIM,
                name=f"layers.{layer}",
                count=claim[layer][worst],
                limit=numbers[worst],
                share=sum(apart) / tokens,
                margin=margin(place),
            )
    return None


def margin(place: int) -> float:
    """Return what share of the tokens a claim may differ by, summed over experts, in the adapted layer at a place from 0."""
    return min(MOST_MARGIN, MARGIN * (place + 1))

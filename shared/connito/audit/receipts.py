"""The receipt of a submission: what it was made of, who signed what, and whether its result follows from that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from connito.audit import intake, recompute
from connito.audit.artifacts import Artifacts, Named
from connito.audit.audit import Options, pure, recomputed
from connito.audit.differences import Difference, Step
from connito.audit.evidence import Evidence, signatures
from connito.errors import Invalid, NotFound
from connito.protocol.assignment import assigned
from connito.protocol.retention import horizon
from connito.protocol.scoring.copies import REMEMBERED_CYCLES
from connito.render import formats
from connito.v1 import cycle_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views.sentences import detail_of
from connito.views.standings import ratings, validator_rows
from connito.wire.enums import plain_name, reason_name
from connito.wire.fact import Fact


@dataclass(frozen=True)
class SubmissionId:
    """`<run>/<cycle>/<miner>`: the miner by its key, its label, or an unambiguous start of either."""

    run: str
    cycle: int
    miner: str

    @classmethod
    def parse(cls, text: str) -> SubmissionId:
        """Parse a submission id. Raises `Invalid` that describes its form."""
        parts = text.split("/")
        if len(parts) != 3 or not parts[1].isdecimal() or not all(parts):
            raise Invalid(
                f"{text!r} does not name a submission; write <run>/<cycle>/<miner>, for example demo/1/miner-1"
            )
        return cls(parts[0], int(parts[1]), parts[2])


def find_miner(evidence: Evidence, wanted: SubmissionId) -> str:
    """Return the key of the miner that is meant. Raises `NotFound` naming those who took part, `Invalid` for several."""
    people = {key: evidence.name(key) for key in evidence.facts.miners}
    exact = [key for key, label in people.items() if wanted.miner in (key, label)]
    found = exact or [key for key in people if len(wanted.miner) >= 6 and key.startswith(wanted.miner)]
    if len(found) > 1:
        raise Invalid(
            f"{formats.count(len(found), 'miner')} are called {wanted.miner!r}; give the key: {', '.join(found)}"
        )
    if not found:
        raise NotFound(f"no miner of {wanted.run} is called {wanted.miner!r}; there are {', '.join(people.values())}")
    return found[0]


def needs(entry: Named, cycle: int) -> bool:
    """Return whether an artifact has a part in the result of a cycle: works of the last ones before do, which its own are held
    against; not what was refused then, nor what came later.
    """
    if entry.cycle >= cycle or entry.what.startswith("refused") or "library" in entry.what:
        return entry.cycle == cycle
    return not entry.miner or entry.cycle >= cycle - REMEMBERED_CYCLES


@dataclass(frozen=True)
class Receipt:
    """A submission's inputs and result, and the checks that were made on them."""

    content: dict[str, Any]
    steps: list[Step]

    @property
    def differences(self) -> list[Difference]:
        """Return the differences between the result and the receipt."""
        return [difference for step in self.steps for difference in step.differences]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document that `connito explain --json` prints."""
        return {
            **self.content,
            "result": "differs" if self.differences else "same",
            "differences": [difference.to_json() for difference in self.differences],
            "checks": [step.to_json() for step in self.steps],
        }


def explain(evidence: Evidence, artifacts: Artifacts, cycle: int, miner: str, options: Options) -> Receipt:
    """Assemble a submission's receipt and recompute its result. Blocking.

    Raises `NotFound` when the miner said nothing in the cycle.
    """
    artifacts.check_key()
    content = receipt(evidence, cycle, miner)
    if options.files and cycle < (kept := horizon(evidence.facts)):
        raise Invalid(
            f"run {evidence.run} keeps the artifacts of cycles from {kept}; an earlier submission cannot be measured again"
        )
    steps = [_about(step, cycle, miner) for step in _steps(evidence, artifacts, cycle, miner, options)]
    return Receipt(content, steps)


def _steps(evidence: Evidence, artifacts: Artifacts, cycle: int, miner: str, options: Options) -> Iterator[Step]:
    yield signatures(evidence)
    if options.files:
        yield artifacts.step(miner=miner)
    submission = submission_of(evidence, cycle, miner)
    if submission is not None and submission.origin_cycle not in (0, cycle):
        yield intake.commitments(evidence, submission.origin_cycle)
    yield from pure(evidence, cycle)
    if not options.files or evidence.facts.spec is None or evidence.facts.window("train", cycle).opened is None:
        return
    work = recompute.Recomputation(evidence, artifacts, options.tolerance, say=options.say)
    models = None
    if options.model and submission is not None and evidence.facts.selection is not None:
        from connito.audit import remeasure

        models = remeasure.Models(evidence, artifacts, options.threads)
    yield from recomputed(work, models, cycle, miner)


def _about(step: Step, cycle: int, miner: str) -> Step:
    """Return a step without what concerns other submissions, and other cycles."""
    kept = tuple(
        difference
        for difference in step.differences
        if difference.miner in ("", miner) and (difference.cycle in (0, cycle) or step.cycle == difference.cycle)
    )
    return replace(step, differences=kept)


def submission_of(evidence: Evidence, cycle: int, miner: str) -> cycle_pb2.Submission | None:
    """Return the miner's settled submission that a cycle scored."""
    entries = evidence.facts.window("submit", cycle).submissions
    return next((entry for entry in entries if entry.miner == miner), None)


def receipt(evidence: Evidence, cycle: int, miner: str) -> dict[str, Any]:
    """Return inputs, seed, batches, losses, reason and signatures of a submission. Raises `NotFound` when there is
    nothing.
    """
    facts, entry = evidence.facts, submission_of(evidence, cycle, miner)
    signed = _signatures(evidence, cycle, miner, entry)
    if not signed:
        raise NotFound(f"{evidence.name(miner)} said nothing in cycle {cycle} of {evidence.run}")
    version = facts.version(cycle)
    return {
        "submission": f"{evidence.run}/{cycle}/{miner}",
        "run": evidence.run,
        "cycle": cycle,
        "miner": miner,
        "label": evidence.name(miner),
        "origin_cycle": cycle if entry is None else entry.origin_cycle or cycle,
        "inputs": None if entry is None else _inputs(evidence, cycle, entry),
        "draw": _draw(evidence, cycle, miner),
        "reports": [
            _score(validator, score)
            for validator, fact in facts.reports(cycle).items()
            for score in fact.message.scores
            if score.miner == miner
        ],
        "validators": [vars(row) for row in validator_rows(facts, cycle)],
        "verdict": _verdict(evidence, cycle, miner),
        "refusals": _refusals(evidence, cycle, miner),
        "version": None if version is None else {"version": version.version, "state": _ref(version.state)},
        "signatures": signed,
    }


def _ref(ref: ArtifactRef) -> dict[str, Any]:
    return {"digest": ref.digest, "bytes": ref.size}


def _inputs(evidence: Evidence, cycle: int, entry: cycle_pb2.Submission) -> dict[str, Any]:
    origin = entry.origin_cycle or cycle
    accepted = evidence.facts.commitment(origin, entry.miner)
    return {
        "artifact": _ref(entry.artifact),
        "base_state": _ref(entry.base_state),
        "commitment": "" if accepted is None else accepted.digest.hex(),
        "commit_sequence": entry.commit_sequence,
        "reveal_sequence": entry.reveal_sequence,
    }


def _draw(evidence: Evidence, cycle: int, miner: str) -> dict[str, Any] | None:
    drawn = evidence.facts.drawn(cycle)
    if drawn is None:
        return None
    duties = assigned(evidence.facts, cycle)
    chosen = [name for name in drawn.validators if duties is None or miner in duties[name]]
    return {
        "seed": drawn.seed.hex(),
        "validators": list(drawn.validators),
        "omitted": list(drawn.omitted),
        "assigned": chosen,
    }


def _score(validator: str, score: cycle_pb2.SubmissionScore) -> dict[str, Any]:
    return {
        "validator": validator,
        "utility": score.utility,
        "effect": [score.effect_low, score.effect, score.effect_high],
        "general_change": [score.general_change, score.general_change_high],
        "reason": reason_name(score.reason),
        "detail": detail_of(score),
        "evaluated_sequences": score.evaluated_sequences,
        "losses": [
            {
                "domain": loss.domain,
                "sequence": loss.sequence,
                "tokens": loss.tokens,
                "before": loss.before,
                "after": loss.after,
            }
            for loss in score.losses
        ],
    }


def _verdict(evidence: Evidence, cycle: int, miner: str) -> dict[str, Any] | None:
    scored = evidence.facts.scored(cycle)
    for verdict in scored.verdicts if scored is not None else ():
        if verdict.miner == miner:
            status = plain_name(cycle_pb2.VerdictStatus, verdict.status)
            return {
                "status": status,
                "reason": reason_name(verdict.reason),
                "detail": detail_of(verdict),
                "utility": verdict.utility,
                "rank": verdict.rank,
                "reward": verdict.reward,
                "withheld": verdict.withheld,
                "rating": ratings(evidence.facts, cycle).get(miner),
                "weight": verdict.weight,
            }
    return None


def _refusals(evidence: Evidence, cycle: int, miner: str) -> list[dict[str, Any]]:
    rows = []
    for window in ("commit", "submit"):
        for fact in evidence.facts.window(window, cycle).refused.values():
            refused = fact.message
            if refused.miner == miner:
                name, sequence = reason_name(refused.reason), refused.ingress_sequence
                rows.append({"window": window, "reason": name, "detail": detail_of(refused), "sequence": sequence})
    return rows


def _signatures(evidence: Evidence, cycle: int, miner: str, entry: cycle_pb2.Submission | None) -> list[dict[str, Any]]:
    """Return every signed message that the result rests on, in the order of the cycle; empty when there is none by the
    miner.
    """
    origin = cycle if entry is None else entry.origin_cycle or cycle
    said = [f for f in evidence.said.values() if f.signer == miner and f.key.cycle in (origin, cycle)]
    refused = [f"{miner}-{fact.sequence}" for fact in said] + [f"{miner}-0"]
    places = [("commit", origin, "accepted", miner), ("submit", cycle, "accepted", miner)]
    places += [
        (window, c, "refused", id_) for window in ("commit", "submit") for c in (origin, cycle) for id_ in refused
    ]
    answers = [fact for place in places if (fact := evidence.facts.fact(*place)) is not None]
    if not said and not answers:
        return []
    judged: list[Fact] = [*evidence.facts.reports(cycle).values()]
    judged += [f for kind in ("scored", "version") if (f := evidence.facts.fact("merge", cycle, kind)) is not None]
    drawn = evidence.facts.window("validate", cycle).drawn_fact
    unique = {(fact.stream, fact.sequence): fact for fact in (*said, *answers, *((drawn,) if drawn else ()), *judged)}
    return [_signature(fact) for fact in unique.values()]


def _signature(fact: Fact) -> dict[str, Any]:
    key = fact.key
    parts = [key.section, key.kind] if key.section == "ingress" else [key.section, str(key.cycle), key.kind]
    return {
        "message": ".".join(parts),
        "cycle": key.cycle,
        "stream": fact.stream,
        "sequence": fact.sequence,
        "signer": fact.signer,
        "time_unix_ms": fact.time_unix_ms,
    }

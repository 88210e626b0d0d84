"""Who may read what because of a run, where every digest stands in a log that everybody reads."""

from __future__ import annotations

from typing import Any

import pytest
from connito.errors import Invalid
from connito.protocol.entitlement import Naming, base_proof, for_customer, for_miners, free_base_name
from connito.v1 import run_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, ArtifactRef
from connito.wire.facts import RunFacts

from tests.support.run import Run, ref, theta

TRAIN, PROBE, HELD, GENERAL, BENCH, MANIFEST, EXPERT, OUTER = (ref(letter * 64) for letter in "123456ab")
STEPS = {cycle: ref(str(cycle) * 63 + "f") for cycle in (1, 2)}


def corpus(artifact: ArtifactRef, *, held: bool = False) -> run_pb2.CorpusRef:
    given = ArtifactRef()
    given.CopyFrom(artifact)
    if held:
        given.realm = REALM_HOLDOUT
    return run_pb2.CorpusRef(domain="medical", artifact=given)


def told(name: str, customer: str, **fields: Any) -> Run:
    spec = run_pb2.RunSpec(run=name, domain="medical", cycles=2, customer=customer, **fields)
    return Run(name=name).created(spec)


def whole(name: str = "clinic", customer: str = "clinic", visibility: str = "private") -> Run:
    """A run with everything in it: two versions, of which no window opened on the second, and a deposit."""
    base = run_pb2.BaseRef(name="demo", manifest=MANIFEST)
    run = told(
        name, customer, visibility=visibility, base=base, train=corpus(TRAIN), probe=corpus(PROBE),
        holdout=corpus(HELD, held=True), general_holdouts=[corpus(GENERAL, held=True)],
        benchmarks=[corpus(BENCH, held=True)],
    ).selected()  # fmt: skip
    for cycle in (1, 2):
        made = {"state": theta(cycle), "outer_state": OUTER, "step": STEPS[cycle]}
        run.opened("train", cycle).say("merge", cycle, "version", **made)
    return run.say("library", 0, "deposited", expert_id="e", expert=EXPERT)


def of(*runs: Run) -> tuple[Naming, dict[str, RunFacts]]:
    """The log of all of them; each was created after the one before."""
    naming = Naming()
    for place, run in enumerate(runs, 1):
        for fact in run.log:
            naming.add(fact)
        created = run.facts.created_fact
        assert created is not None
        object.__setattr__(created, "sequence", place)
    return naming, {run.name: run.facts for run in runs}


def digests(refs: Any) -> set[str]:
    return {entry.digest for entry in refs if entry.digest}


def test_miners_read_what_they_train_from_and_nothing_that_is_held_out() -> None:
    """Of the version that no cycle began from, which is what the run delivers, not even the step that leads to it."""
    assert digests(for_miners(whole().facts)) == {TRAIN.digest, theta(0).digest, theta(1).digest, STEPS[1].digest}


def test_a_customer_reads_what_it_brought_and_what_came_out() -> None:
    mine = digests(for_customer(whole().facts))
    assert mine >= {one.digest for one in (TRAIN, PROBE, HELD, GENERAL, BENCH, EXPERT, theta(2))}


@pytest.mark.parametrize("taken", [TRAIN, PROBE, HELD, GENERAL, BENCH, EXPERT, OUTER, STEPS[2], theta(0), theta(2)])
@pytest.mark.parametrize("use", ["train", "probe", "replay", "holdout", "general_holdouts", "benchmarks", "beside"])
def test_to_name_what_another_customer_keeps_to_itself_is_no_right_to_it(taken: ArtifactRef, use: str) -> None:
    held = use in ("holdout", "general_holdouts", "benchmarks")
    named: Any = corpus(taken, held=held)
    many = use in ("general_holdouts", "benchmarks", "beside")
    naming, runs = of(whole(), told("grab", "mallory", **{use: [named] if many else named}))
    with pytest.raises(Invalid, match="another customer's"):
        naming.check(runs["grab"].require_spec(), runs)


def test_a_public_runs_hold_out_is_not_for_others_but_its_text_is() -> None:
    naming, runs = of(whole(visibility="public"), told("b", "bank", train=corpus(TRAIN)))
    naming.check(runs["b"].require_spec(), runs)
    naming, runs = of(whole(visibility="public"), told("b", "bank", general_holdouts=[corpus(HELD, held=True)]))
    with pytest.raises(Invalid, match="another customer's"):
        naming.check(runs["b"].require_spec(), runs)


def test_ones_own_runs_share_everything() -> None:
    again = told("later", "clinic", train=corpus(TRAIN), holdout=corpus(HELD, held=True), start_from="e")
    naming, runs = of(whole(), again)
    naming.check(runs["later"].require_spec(), runs)


def test_who_comes_first_is_said_by_the_log_and_not_by_the_order_of_reading() -> None:
    first, second = whole(), told("grab", "mallory", train=corpus(TRAIN))
    naming, runs = of(first, second)
    other = Naming()
    for fact in (*second.log, *first.log):
        other.add(fact)
    for known in (naming, other):
        known.check(runs["clinic"].require_spec(), runs)
        assert not known.allows(TRAIN, runs["grab"].require_spec(), runs)


def test_a_name_belongs_to_the_base_that_had_it_first() -> None:
    base = run_pb2.BaseRef(name="demo", manifest=ref("e" * 64))
    naming, runs = of(whole(visibility="public"), told("evil", "mallory", base=base))
    with pytest.raises(Invalid, match="belongs to another base") as caught:
        naming.check(runs["evil"].require_spec(), runs)
    free = free_base_name("demo", "e" * 64, "mallory", runs.values())
    assert free == "demo-" + "e" * 12
    assert free in str(caught.value)
    assert free_base_name("demo", MANIFEST.digest, "mallory", runs.values()) == "demo"
    assert free_base_name("demo", "e" * 64, "clinic", runs.values()) == "demo", "who gave it may give it again"


def test_the_proof_of_a_base_is_of_one_customer_and_one_manifest() -> None:
    proofs = {base_proof(customer, raw) for customer in ("a", "b") for raw in (b"{}", b"{ }")}
    assert len(proofs) == 4

"""What a customer may ask for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from connito.errors import Invalid
from connito.protocol.policy.check import complete
from connito.protocol.policy.choices import AGGREGATORS, METHODS
from connito.protocol.policy.law import DEFAULTS
from connito.v1 import reasons_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PRIVATE, REALM_PUBLIC, REALM_SUBMISSION, ArtifactRef, Realm
from connito.v1.run_pb2 import BaseRef, CorpusRef, RunSpec, TrainPolicy, WindowPolicy

CUSTOMER = "U" + "A" * 55


def ref(realm: Realm.ValueType) -> ArtifactRef:
    return ArtifactRef(digest="ab" * 32, size=10, realm=realm)


def corpus(domain: str, realm: Realm.ValueType) -> CorpusRef:
    return CorpusRef(domain=domain, artifact=ref(realm))


def minimal() -> RunSpec:
    """The least that a customer has to say."""
    return RunSpec(
        run="job-1",
        domain="medical",
        cycles=3,
        base=BaseRef(name="tiny", manifest=ref(REALM_PUBLIC)),
        probe=corpus("medical", REALM_PUBLIC),
        train=corpus("medical", REALM_PUBLIC),
        holdout=corpus("medical", REALM_HOLDOUT),
        general_holdouts=[corpus("code", REALM_HOLDOUT), corpus("legal", REALM_HOLDOUT)],
    )


def test_the_least_is_enough_and_takes_every_default() -> None:
    spec = complete(minimal(), CUSTOMER)
    assert spec.training == DEFAULTS.training
    assert spec.scoring == DEFAULTS.scoring
    assert spec.merging == DEFAULTS.merging
    assert spec.windows == DEFAULTS.windows
    assert spec.rewards == DEFAULTS.rewards
    assert (spec.selection.method, spec.selection.threshold) == ("esft-token", 0.2)
    assert spec.customer == CUSTOMER
    assert spec.emission == DEFAULTS.emission


def test_completing_is_idempotent_and_leaves_its_argument_alone() -> None:
    asked = minimal()
    spec = complete(asked, CUSTOMER)
    assert asked == minimal()
    assert complete(spec, CUSTOMER) == spec


def test_in_a_policy_that_is_given_zero_means_zero_where_zero_makes_sense() -> None:
    asked = minimal()
    asked.training.CopyFrom(TrainPolicy(local_steps=7))
    asked.selection.method = "esft-gate"
    spec = complete(asked, CUSTOMER)
    assert (spec.training.local_steps, spec.training.learning_rate) == (7, DEFAULTS.training.learning_rate)
    assert spec.training.weight_decay == 0
    assert spec.selection.threshold == METHODS["esft-gate"]
    assert spec.selection.helpers_per_layer == 0


def test_leaving_a_rate_out_is_not_setting_it_to_zero() -> None:
    asked = minimal()
    asked.rewards.payout = "proportional"
    assert complete(asked, CUSTOMER).rewards.bond_rate == DEFAULTS.rewards.bond_rate
    assert complete(asked, CUSTOMER).training.beta1 == DEFAULTS.training.beta1
    asked.training.beta1 = 0
    asked.rewards.bond_rate = asked.rewards.probation_pay = 0
    spec = complete(asked, CUSTOMER)
    assert (spec.rewards.payout, spec.rewards.bond_rate, spec.rewards.probation_pay) == ("proportional", 0, 0)
    assert spec.training.HasField("beta1")
    assert spec.training.beta1 == 0


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_is_accepted(name: str) -> None:
    asked = minimal()
    asked.merging.aggregator = name
    assert complete(asked, CUSTOMER).merging.aggregator == name


def set_(path: str, value: object) -> Callable[[RunSpec], None]:
    def change(spec: RunSpec) -> None:
        *parents, name = path.split(".")
        target: object = spec
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)

    return change


def private(of: Callable[[RunSpec], ArtifactRef]) -> Callable[[RunSpec], None]:
    """Name a corpus that is encrypted under another secret than the run's."""

    def change(spec: RunSpec) -> None:
        spec.secret.CopyFrom(ArtifactRef(digest="e" * 64, size=300, realm=REALM_PUBLIC))
        of(spec).MergeFrom(ArtifactRef(realm=REALM_PRIVATE, secret="d" * 64))

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_("run", "a b"), "run"),
        (set_("run", ""), "run"),
        (set_("run", "a.b"), "run"),
        (set_("domain", "medi/cal"), "domain"),
        (set_("cycles", 0), "cycles is 0; ask for 1 to 1000"),
        (set_("cycles", 1001), "cycles"),
        (set_("base.name", ""), r"base\.name"),
        (set_("base.manifest.digest", "AB" * 32), r"base\.manifest\.digest"),
        (set_("base.manifest.size", 0), r"base\.manifest\.size"),
        (set_("base.manifest.realm", REALM_HOLDOUT), r"base\.manifest\.realm is REALM_HOLDOUT.*REALM_PUBLIC"),
        (set_("train.artifact.realm", REALM_HOLDOUT), r"train\.artifact\.realm"),
        (set_("holdout.artifact.realm", REALM_PUBLIC), r"holdout\.artifact\.realm.*REALM_HOLDOUT"),
        (set_("probe.artifact.realm", REALM_SUBMISSION), r"probe\.artifact\.realm"),
        (set_("holdout.domain", "code"), r"holdout\.domain"),
        (lambda spec: spec.general_holdouts.pop() and spec.general_holdouts.pop(), "general_holdouts is empty"),
        (lambda spec: spec.general_holdouts.append(corpus("code", REALM_HOLDOUT)), "twice"),
        (lambda spec: spec.general_holdouts.append(corpus("math", REALM_PUBLIC)), r"general_holdouts\[2\].*realm"),
        (set_("replay.domain", "general"), r"replay\.artifact\.digest"),
        (set_("training.replay_share", 0.5), r"training\.replay_share"),
        (set_("training.learning_rate", float("nan")), r"training\.learning_rate is nan"),
        (set_("training.learning_rate", -1.0), r"training\.learning_rate"),
        (set_("training.weight_decay", float("inf")), r"training\.weight_decay"),
        (set_("training.routing_mode", "guess"), r"natural, masked, restricted"),
        (set_("selection.method", "best"), r"esft-token"),
        (set_("selection.threshold", 1.5), r"selection\.threshold is 1\.5; choose"),
        (set_("scoring.confidence", 1.0), r"scoring\.confidence"),
        (set_("merging.aggregator", "sum"), r"krum"),
        (set_("merging.outer_momentum", 1.0), r"merging\.outer_momentum"),
        (set_("rewards.payout", "lottery"), r"rewards\.payout is 'lottery'; choose one of proportional, rank-table"),
        (set_("rewards.validator_share", 1.0), r"rewards\.validator_share"),
        (set_("rewards.bond_rate", -0.1), r"rewards\.bond_rate"),
        (set_("rewards.probation_pay", 2.0), r"rewards\.probation_pay"),
        (lambda spec: spec.rewards.rank_shares.extend([1, 2]), r"rewards\.rank_shares is \[1, 2\].*largest first"),
        (lambda spec: spec.rewards.rank_shares.append(0), r"rewards\.rank_shares"),
        (set_("windows.floor_seconds", 5000.0), r"windows\.floor_seconds is larger"),
        (set_("windows.min_miners", 1_000_000), r"windows\.min_miners"),
        (set_("customer", "somebody"), "customer"),
        (set_("emission", 1 << 60), "emission"),
        (set_("license", "x" * 5000), "license"),
        (set_("license", "one page\x0cand another"), "license holds control characters"),
        (set_("data_statement", "red \x1b[31m text"), "data_statement holds control characters"),
        (set_("visibility", "secret"), "visibility.*organisation, private"),
        (set_("visibility", "organisation"), "organisation is empty"),
        (lambda spec: spec.data_sources.append(""), "data_sources"),
        (set_("visibility", "private"), "secret is empty, so what the run makes would lie open"),
        (set_("train.artifact.secret", "d" * 64), "secret is not the one that a corpus"),
        (private(lambda spec: spec.train.artifact), "secret is not the one that a corpus"),
        (private(lambda spec: spec.beside.add().artifact), "secret is not the one that a corpus"),
    ],
)
def test_what_cannot_work_is_refused_with_field_and_remedy(change: Callable[[RunSpec], object], says: str) -> None:
    asked = minimal()
    change(asked)
    with pytest.raises(Invalid, match=says) as caught:
        complete(asked, CUSTOMER)
    assert caught.value.reason in (reasons_pb2.REASON_BAD_SPEC, reasons_pb2.REASON_MALFORMED)


def test_short_windows_for_tests_are_possible() -> None:
    asked = minimal()
    asked.windows.CopyFrom(WindowPolicy(floor_seconds=0.1, ceiling_seconds=2, assemble_seconds=5))
    windows = complete(asked, CUSTOMER).windows
    assert (windows.floor_seconds, windows.ceiling_seconds, windows.min_miners) == (0.1, 2, 1)


@pytest.mark.parametrize(
    ("steps", "batch", "length", "taken"),
    [
        (100_000, 32, 128, True),
        (2_048, 512, 1_024, True),
        # Each within its limits: 3 TB of text for each miner, and for each validator that counts a claim again.
        (100_000, 65_536, 128, False),
        (100_000, 64, 4, False),
        (1_000, 65_536, 1 << 20, False),
    ],
)
def test_a_cycle_is_no_more_text_than_a_machine_holds(steps: int, batch: int, length: int, taken: bool) -> None:
    asked = minimal()
    asked.training.CopyFrom(TrainPolicy(local_steps=steps, batch_sequences=batch, sequence_length=length))
    if taken:
        assert complete(asked, CUSTOMER).training.local_steps == steps
        return
    with pytest.raises(Invalid, match=r"training.local_steps makes .* tokens a cycle, and more cycles") as caught:
        complete(asked, CUSTOMER)
    assert caught.value.reason == reasons_pb2.REASON_BAD_SPEC

"""A job runs with the platform's policies unless it says otherwise, and what the coordinator would refuse it hears first."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.errors import Invalid
from connito.jobs.check import Checked, check, check_file
from connito.jobs.policies import check_policies
from connito.jobs.spec import parse_job
from connito.platform.session import Session
from connito.protocol.policy.check import complete
from connito.protocol.policy.choices import METHODS
from connito.protocol.policy.law import DEFAULTS
from connito.protocol.tenancy import check_submission
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, ArtifactRef
from connito.v1.run_pb2 import BaseRef, CorpusRef, RunSpec
from connito.wire.facts import RunFacts
from connito.wire.roster import Roster

from tests.support.run import Run

COORDINATOR = Path(__file__).parents[4] / "services/coordinator/api.py"

JOB = {
    "domain": "code", "base": "base", "data": [{"path": "code.jsonl"}], "license": "PSF-2.0", "data_statement": "Python.",
    "general": [{"domain": "prose", "path": "prose.jsonl"}],
}  # fmt: skip


def checked(customer: Path, **fields: Any) -> Checked:
    return check(parse_job({**JOB, **fields}), customer, customer / "no-platform")


def test_a_job_on_any_base_takes_the_platform_s_policies(customer: Path) -> None:
    spec = checked(customer).spec
    # Its lengths follow from the text.
    spec.training.sequence_length, spec.training.batch_sequences = 128, 4
    for policy in ("training", "scoring", "merging", "rewards"):
        assert getattr(spec, policy) == getattr(DEFAULTS, policy), policy
    assert spec.windows.ceiling_seconds == DEFAULTS.windows.ceiling_seconds


def test_a_profile_is_taken_only_by_name(customer: Path) -> None:
    spec = checked(customer, profile="tiny", policies={"training": {"local_steps": 3}}).spec
    assert (spec.training.local_steps, spec.training.sequence_length) == (3, 64)
    assert spec.scoring.confidence == 0.99
    assert spec.merging.aggregator == DEFAULTS.merging.aggregator


def test_a_method_brings_its_own_threshold(customer: Path) -> None:
    spec = checked(customer, policies={"selection": {"method": "differential"}}).spec
    assert spec.selection.threshold == METHODS["differential"]


def test_a_list_is_a_policy_too(customer: Path) -> None:
    assert checked(customer, policies={"rewards": {"rank_shares": [5, 3]}}).spec.rewards.rank_shares == [5, 3]


def test_the_command_line_s_profile_goes_before_the_file_s(customer: Path) -> None:
    file = customer / "profiled.yaml"
    file.write_text(json.dumps({**JOB, "profile": "laptop"}))
    assert check_file(file, customer / "no-platform").spec.scoring.general_sequences == 1
    assert check_file(file, customer / "no-platform", profile="tiny").spec.training.beta1 == 0.9
    with pytest.raises(Invalid, match="no profile 'desktop'; choose one of platform, laptop, tiny"):
        check_file(file, customer / "no-platform", profile="desktop")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policies": {"scoring": {"confidence": 2.0}}}, "scoring.confidence is 2"),
        ({"policies": {"training": {"learning_rate": 50}}}, "training.learning_rate is 50"),
        ({"policies": {"merging": {"aggregator": "sum"}}}, "merging.aggregator is 'sum'"),
        ({"policies": {"rewards": {"payout": "lottery"}}}, "rewards.payout is 'lottery'"),
        ({"policies": {"windows": {"floor_seconds": 4000}}}, "windows.floor_seconds is larger than"),
        ({"people": {"enrolment": "allow-list"}}, "people.allowed is empty"),
        ({"people": {"allowed": ["UA"]}}, "people.allowed names keys, but the mode is open"),
        ({"people": {"enrolment": "invite", "allowed": ["me"]}}, "people.allowed holds 'me'"),
        ({"people": {"enrolment": "invite", "miners": 3, "at_most": 2}}, "people.at_most is below people.miners"),
        (
            {"people": {"miners": 3}, "policies": {"windows": {"min_miners": 5}}},
            "policies.windows.min_miners is 5, but",
        ),
        ({"replay": 0.5, "policies": {"training": {"replay_share": 0}}}, "policies.training.replay_share is 0, but"),
        ({"run": "installation"}, "run is 'installation', which stands for every run"),
        ({"run": "library"}, "run is 'library', which stands for every run"),
        ({"start_from": "an expert"}, "start_from is 'an expert'"),
        ({"license": "LicenseRef-" + "x" * 4000}, "license is longer than 4000"),
        ({"data": [{"path": "code.jsonl", "name": "x" * 300}]}, "data names too many"),
    ],
)
def test_what_the_coordinator_would_refuse_is_refused_by_the_check(
    customer: Path, fields: dict[str, Any], said: str
) -> None:
    found = checked(customer, **fields)
    assert not found.ok
    errors = [row.detail for row in found.findings if row.level == "error"]
    assert [detail for detail in errors if detail.startswith(said)], errors


def test_every_field_that_cannot_be_set_is_told_at_once(customer: Path) -> None:
    policies = {"training": {"local_steps": 1.5, "steps": 2}, "enrolment": {"mode": "invite"}}
    with pytest.raises(Invalid) as caught:
        checked(customer, policies=policies)
    for said in ("training.local_steps cannot be 1.5", "no field 'steps'", "no section 'enrolment'", "`people`"):
        assert said in str(caught.value)


def test_a_job_for_the_domain_general_is_told_what_it_lacks_and_nothing_else(customer: Path) -> None:
    found = checked(customer, domain="general", general=[])
    assert [row.check for row in found.findings if row.level == "error"] == ["size"]


def test_every_fault_is_told_at_once(customer: Path) -> None:
    found = checked(customer, policies={"scoring": {"confidence": 2.0}, "training": {"learning_rate": 50}})
    assert len([row for row in found.findings if (row.check, row.level) == ("policy", "error")]) == 2


ME, OTHER = "U" + "A" * 55, "U" + "B" * 55
KNOWN = Roster({"customer": frozenset({ME})}, organisations={"hospital": frozenset({ME, OTHER})})


def on_a_platform(
    customer: Path,
    taken: RunSpec | None = None,
    roster: Roster = KNOWN,
    runs: dict[str, RunFacts] | None = None,
    **fields: Any,
) -> list[str]:
    found = checked(customer, **fields)
    session = SimpleNamespace(identity=SimpleNamespace(public=ME), roster=roster)
    context = replace(found.context, session=cast(Session, session), taken=taken, runs=runs or {})
    return [row.detail for row in check_policies(found.job, found.spec, context) if row.level == "error"]


def under_way(*names: str) -> dict[str, RunFacts]:
    return {name: Run(name=name).created(customer=OTHER).facts for name in names}


# By the coordinator's own words, for which a key, an organisation or the log is the reason.
REFUSED: dict[str, dict[str, Any]] = {
    "is not a customer in the operator's roster": {"roster": Roster({"customer": frozenset()})},
    "is a reader of its organisation": {"roster": replace(KNOWN, duties={"hospital": {ME: "reader"}})},
    "hospital may have 1 runs under way and has 1 (theirs)": {
        "roster": replace(KNOWN, quotas={"hospital": 1}), "runs": under_way("theirs"),
    },
    "to which the roster does not count": {"privacy": {"visibility": "organisation", "organisation": "court"}},
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_the_coordinator_refuses_of_a_customer_the_check_refuses_in_its_words(customer: Path, said: str) -> None:
    given = REFUSED[said]
    (found,) = on_a_platform(customer, **given)
    assert said in found
    # What the coordinator does with a request, in its order.
    known, spec = given.get("roster", KNOWN), checked(customer, privacy=given.get("privacy", {})).spec
    with pytest.raises(Invalid) as refusal:
        coordinate(known, whole(spec), given.get("runs", {}))
    assert said in str(refusal.value)


def coordinate(roster: Roster, asked: RunSpec, runs: dict[str, RunFacts]) -> None:
    roster.require("customer", ME)
    check_submission(complete(asked, ME, roster.memberships(ME)), ME, roster, runs)


def whole(spec: RunSpec) -> RunSpec:
    """A spec as an upload completes it."""
    public, held_out = (ArtifactRef(digest="0" * 64, size=1, realm=realm) for realm in (REALM_PUBLIC, REALM_HOLDOUT))
    asked = RunSpec()
    asked.CopyFrom(spec)
    asked.run = asked.run or "new"
    asked.base.CopyFrom(BaseRef(name="base", manifest=public))
    for corpus in (asked.probe, asked.train):
        corpus.CopyFrom(CorpusRef(domain=asked.domain, artifact=public))
    asked.holdout.CopyFrom(CorpusRef(domain=asked.domain, artifact=held_out))
    asked.general_holdouts.append(CorpusRef(domain="prose", artifact=held_out))
    return asked


def test_the_coordinator_refuses_nothing_that_the_check_does_not_ask(customer: Path) -> None:
    """Whoever gives the coordinator another reason to refuse a run has to ask for it here, too."""
    asked = {
        "open_request",
        "take",
        "complete",
        "memberships",
        "refresh",
        "check",
        "check_submission",
        "publish_fact",
        "_wait",
    }
    create = next(
        node for node in ast.walk(ast.parse(COORDINATOR.read_text()))
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "CreateRun"
    )  # fmt: skip
    called = {
        call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
        for call in ast.walk(create)
        if isinstance(call, ast.Call) and isinstance(call.func, (ast.Attribute, ast.Name))
    }
    assert called - {"Invalid", "RunCreated", "CreateRunResponse"} == asked


def test_an_organisation_has_to_count_the_customer(customer: Path) -> None:
    privacy = {"visibility": "organisation", "organisation": "hospital"}
    assert on_a_platform(customer, privacy=privacy) == []
    (error,) = on_a_platform(customer, privacy={**privacy, "organisation": "court"})
    assert error.startswith("privacy.organisation is 'court', to which the roster does not count")


def test_a_run_s_id_is_free_or_the_same_job_s(customer: Path) -> None:
    asked = checked(customer, run="mine").spec
    created = complete_with_artifacts(asked)
    assert on_a_platform(customer, created, run="mine") == []
    created.training.local_steps += 1
    (error,) = on_a_platform(customer, created, run="mine")
    assert error == "run is 'mine', and a run of that id asks for something else"


def complete_with_artifacts(asked: RunSpec) -> RunSpec:
    """What the coordinator writes down for a job that was submitted."""
    spec = RunSpec()
    spec.CopyFrom(asked)
    public, held = (ArtifactRef(digest="ab" * 32, size=9, realm=realm) for realm in (REALM_PUBLIC, REALM_HOLDOUT))
    spec.base.CopyFrom(BaseRef(name="base", manifest=public))
    spec.probe.CopyFrom(CorpusRef(domain="code", artifact=public))
    spec.train.CopyFrom(CorpusRef(domain="code", artifact=public))
    spec.holdout.CopyFrom(CorpusRef(domain="code", artifact=held))
    spec.general_holdouts.append(CorpusRef(domain="prose", artifact=held))
    return complete(spec, "U" + "A" * 55)

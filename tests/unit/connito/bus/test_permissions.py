"""Who may put what on the wire."""

from __future__ import annotations

import pytest
from connito.bus import streams
from connito.bus.permissions import Permissions, permissions
from connito.wire.identity import Identity
from connito.wire.roster import ROLES
from connito.wire.verification import CATALOGUE, INGRESS

KEY, OTHER = (Identity.generate(bytes([n]) * 32).public for n in (1, 2))


def covers(pattern: str, subject: str) -> bool:
    """The broker's wildcards: `*` is one token, `>` at the end is one or more."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        head = wanted[:-1]
        return len(given) > len(head) and all(w in ("*", g) for w, g in zip(head, given, strict=False))
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def may_publish(granted: Permissions, subject: str) -> bool:
    return any(covers(p, subject) for p in granted.publish) and not any(
        covers(p, subject) for p in granted.deny_publish
    )


def fact(section: str, kind: str, id_path: str, id_: str = KEY) -> str:
    return f"connito.v1.run-1.{section}.0.{kind}" + (f".{id_}" if id_path else "")


@pytest.mark.parametrize(("section", "kind"), CATALOGUE)
def test_a_fact_can_be_published_by_its_role_and_by_no_other(section: str, kind: str) -> None:
    _, writer, id_path = CATALOGUE[section, kind]
    subject = fact(section, kind, id_path)
    allowed = {role for role in (*ROLES, "miner") if may_publish(permissions(role, KEY), subject)}
    assert allowed == {writer}


def test_a_validator_speaks_under_its_own_key_only() -> None:
    granted = permissions("validator", KEY)
    for section, kind in (("train", "seed"), ("validate", "seed"), ("validate", "report"), ("run", "validator")):
        assert may_publish(granted, fact(section, kind, "validator", KEY))
        assert not may_publish(granted, fact(section, kind, "validator", OTHER))


def test_a_miner_says_what_miners_say_under_its_own_key_only() -> None:
    granted = permissions("miner", KEY)
    said = {kind for kind in (*INGRESS, "anything") if may_publish(granted, f"connito.v1.run-1.ingress.{KEY}.{kind}")}
    assert said == set(INGRESS)
    assert not any(may_publish(granted, f"connito.v1.run-1.ingress.{OTHER}.{kind}") for kind in INGRESS)
    assert not may_publish(granted, "connito.dlq.v1.INGRESS.1")
    assert not may_publish(granted, f"$KV.{streams.LEASES}.coordinator")
    assert not may_publish(granted, f"$KV.{streams.ENDPOINTS}.committer")


@pytest.mark.parametrize("stream", streams.STREAMS)
def test_a_miner_reads_the_public_streams_and_no_other(stream: str) -> None:
    granted = permissions("miner", KEY)
    requests = [
        f"$JS.API.CONSUMER.CREATE.{stream}.follow-1.connito.v1.run-1.x.>",
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.follow-1",
        f"$JS.API.STREAM.MSG.GET.{stream}",
    ]
    public = stream in {"RUNS", "TRAIN", "COMMIT", "SUBMIT", "MERGE"}
    assert [may_publish(granted, subject) for subject in requests] == [public] * 3
    for verb in ("DELETE", "PURGE", "UPDATE", "CREATE"):
        assert not may_publish(granted, f"$JS.API.STREAM.{verb}.{stream}")


@pytest.mark.parametrize("role", [*ROLES, "miner"])
@pytest.mark.parametrize("durable", streams.DURABLES)
def test_nobody_reaches_into_the_work_queue_of_another_service(role: str, durable: str) -> None:
    granted, stream = permissions(role, KEY), streams.DURABLES[durable].stream
    assert may_publish(granted, f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}") == (role == durable)
    assert may_publish(granted, f"$JS.ACK.{stream}.{durable}.1.2.3.4.5") == (role == durable)
    assert not may_publish(granted, f"$JS.API.CONSUMER.DELETE.{stream}.{durable}")
    if role != durable:
        assert not may_publish(granted, f"$JS.API.CONSUMER.CREATE.{stream}.{durable}.connito.v1.>")


@pytest.mark.parametrize("role", [*ROLES, "miner"])
def test_everybody_hears_only_its_own_replies(role: str) -> None:
    assert permissions(role, KEY).subscribe == (f"_INBOX.{KEY}.>",)


def test_only_leaders_hold_leases_and_only_services_with_an_api_are_found() -> None:
    leads = {role for role in ROLES if may_publish(permissions(role, KEY), f"$KV.{streams.LEASES}.{role}")}
    found = {role for role in ROLES if may_publish(permissions(role, KEY), f"$KV.{streams.ENDPOINTS}.{role}")}
    assert leads == {"coordinator", "aggregator"}
    assert found == {"coordinator", "committer", "library"}
    assert not may_publish(permissions("committer", KEY), f"$KV.{streams.ENDPOINTS}.coordinator")


@pytest.mark.parametrize("role", [*ROLES, "miner"])
def test_services_and_validators_report_offences_under_their_own_key_and_nobody_else_does(role: str) -> None:
    granted = permissions(role, KEY)
    reports = role not in ("miner", "customer")
    assert may_publish(granted, f"connito.security.v1.denied.{KEY}") == reports
    assert not may_publish(granted, f"connito.security.v1.denied.{OTHER}")

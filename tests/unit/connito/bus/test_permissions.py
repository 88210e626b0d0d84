"""Who may put what on the wire."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from connito.bus import offences, streams
from connito.bus.connection import Connection
from connito.bus.permissions import (
    ACCOUNTS,
    ANSWERED,
    ASKED,
    PLATFORM,
    SAID,
    SELF,
    Permissions,
    accounts_of,
    permissions,
)
from connito.v1 import reasons_pb2
from connito.wire.identity import Identity
from connito.wire.roster import OPERATOR, ROLES
from connito.wire.verification import ANY, CATALOGUE, INGRESS, WORKERS

KEY, OTHER = (Identity.generate(bytes([n]) * 32).public for n in (1, 2))
STRANGERS = ("validator", "customer", "miner")
SERVICES = [role for role in ROLES if role not in STRANGERS]


def covers(pattern: str, subject: str) -> bool:
    """The broker's wildcards: `*` is one token, `>` at the end is one or more."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        head = wanted[:-1]
        return len(given) > len(head) and all(w in ("*", g) for w, g in zip(head, given, strict=False))
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def granted(role: str) -> list[Permissions]:
    """The rights of KEY in each account that its role has a pass for."""
    if role not in STRANGERS:
        return [permissions(role, KEY)]
    return [
        Permissions(
            tuple(subject.replace(SELF, KEY) for subject in ACCOUNTS[name].grants.publish),
            tuple(subject.replace(SELF, KEY) for subject in ACCOUNTS[name].grants.subscribe),
        )
        for name in accounts_of(role)
    ]


def may_publish(role: str, subject: str) -> bool:
    return any(covers(pattern, subject) for rights in granted(role) for pattern in rights.publish)


def may_hear(role: str, subject: str) -> bool:
    return any(covers(pattern, subject) for rights in granted(role) for pattern in rights.subscribe)


def fact(section: str, kind: str, id_path: str, id_: str = KEY) -> str:
    return f"connito.v1.run-1.{section}.0.{kind}" + (f".{id_}" if id_path else "")


@pytest.mark.parametrize(("section", "kind"), CATALOGUE)
def test_a_fact_can_be_published_by_its_role_and_by_no_other(section: str, kind: str) -> None:
    _, writer, id_path = CATALOGUE[section, kind]
    subject = fact(section, kind, id_path)
    expected = set(WORKERS) if writer == ANY else {writer} - {OPERATOR}
    assert {role for role in (*ROLES, "miner") if may_publish(role, subject)} == expected


def test_a_validator_speaks_under_its_own_key_only() -> None:
    for section, kind in (
        ("train", "seed"),
        ("validate", "seed"),
        ("validate", "report"),
        ("run", "validator"),
        ("run", "paused"),
    ):
        assert may_publish("validator", fact(section, kind, "validator", KEY))
        assert not may_publish("validator", fact(section, kind, "validator", OTHER))


def test_a_miner_says_what_miners_say_under_its_own_key_only() -> None:
    said = {kind for kind in (*INGRESS, "anything") if may_publish("miner", f"connito.v1.run-1.ingress.{KEY}.{kind}")}
    assert said == set(INGRESS)
    assert not any(may_publish("miner", f"connito.v1.run-1.ingress.{OTHER}.{kind}") for kind in INGRESS)


@pytest.mark.parametrize("role", STRANGERS)
def test_a_stranger_asks_the_brokers_api_where_services_are_and_nothing_else(role: str) -> None:
    for rights in granted(role):
        for subject in rights.publish:
            assert not subject.startswith("$") or subject.startswith("$JS.API.DIRECT.GET.KV_ENDPOINTS.")
            assert ">" not in subject
            assert streams.LEASES not in subject
    assert role in ("validator", "miner") or not any(may_publish(role, fact(*key, "x")) for key in CATALOGUE)


@pytest.mark.parametrize("role", STRANGERS)
def test_nobody_speaks_in_the_account_in_which_it_reads(role: str) -> None:
    """An answer that a reader has sent to somebody's subject must find nothing there that is passed on."""
    *speaking, reading = accounts_of(role)
    assert PLATFORM not in (*speaking, reading)
    assert all(subject.startswith("$JS.API.DIRECT.GET.KV_") for subject in ACCOUNTS[reading].services)
    assert ACCOUNTS[reading].told == (f"{ASKED}.*.*",)
    for name in speaking:
        assert not any(subject.startswith("$") for subject in ACCOUNTS[name].services)
        assert not ACCOUNTS[name].heard


@pytest.mark.parametrize("role", STRANGERS)
def test_an_account_imports_no_more_than_its_keys_may_use(role: str) -> None:
    for name in accounts_of(role):
        account = ACCOUNTS[name]
        questions = {subject for subject in account.grants.publish if subject.startswith(ASKED)}
        assert all(any(covers(told, subject) for told in account.told) for subject in questions)
        said = {subject.replace(SELF, "*") for subject in account.grants.publish if subject not in questions}
        assert said == set(account.services)


@pytest.mark.parametrize("stream", streams.STREAMS)
def test_a_miner_reads_what_an_audit_rests_on_and_nothing_else(stream: str) -> None:
    public = stream != "ADVISORIES"
    assert may_publish("miner", f"{ASKED}.{stream}.{KEY}") == public
    assert not may_publish("miner", f"{ASKED}.{stream}.{OTHER}")
    assert not may_publish("miner", f"$JS.API.DIRECT.GET.{stream}")
    assert may_hear("miner", f"live.{stream}.connito.v1.run-1.x") == public


@pytest.mark.parametrize("role", [*ROLES, "miner"])
@pytest.mark.parametrize("durable", streams.DURABLES)
def test_nobody_reaches_into_the_work_queue_of_another_service(role: str, durable: str) -> None:
    stream = streams.DURABLES[durable].stream
    assert may_publish(role, f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}") == (role == durable)
    assert may_publish(role, f"$JS.ACK.{stream}.{durable}.1.2.3.4.5") == (role == durable)
    assert may_publish(role, f"$KV.{streams.SUSPECTS}.{durable}.1") == (role == durable)
    for verb in ("CREATE", "DELETE"):
        assert not may_publish(role, f"$JS.API.CONSUMER.{verb}.{stream}.{durable}")
    for verb in ("DELETE", "PURGE", "UPDATE", "CREATE"):
        assert not may_publish(role, f"$JS.API.STREAM.{verb}.{stream}")


@pytest.mark.parametrize("role", [*ROLES, "miner"])
def test_everybody_hears_only_its_own_replies_and_hints(role: str) -> None:
    counted = {f"{ASKED}.*.*", "connito.v1.>", "connito.security.v1.>"} if role == "committer" else set()
    own = {f"_INBOX.{KEY}.>", f"{ANSWERED}.{KEY}.>"} | counted
    for rights in granted(role):
        assert all(subject in own or subject.startswith("live.") for subject in rights.subscribe)


def test_only_leaders_hold_leases_and_only_services_with_an_api_are_found() -> None:
    leads = {role for role in ROLES if may_publish(role, f"$KV.{streams.LEASES}.{role}")}
    found = {role for role in ROLES if may_publish(role, f"$KV.{streams.ENDPOINTS}.{role}")}
    assert leads == {"coordinator", "aggregator", "committer"}
    assert found == {"coordinator", "committer", "library"}
    assert not may_publish("committer", f"$KV.{streams.ENDPOINTS}.coordinator")


@pytest.mark.parametrize("role", [*ROLES, "miner"])
def test_services_and_validators_report_offences_under_their_own_key_and_nobody_else_does(role: str) -> None:
    reports = role not in ("miner", "customer")
    assert may_publish(role, f"connito.security.v1.denied.{KEY}") == reports
    assert not may_publish(role, f"connito.security.v1.denied.{OTHER}")
    assert may_publish(role, f"connito.security.v1.made-up.{KEY}") == (reports and role != "validator")


def test_what_a_validators_program_reports_it_may() -> None:
    """A kind that it may not ends its reports."""
    root, counts = Path(offences.__file__).parents[2], {"questions", "connections", "shut_out"}
    sources = [path.read_text() for path in (root / "connito").rglob("*.py") if "/v1/" not in str(path)]
    sources += [path.read_text() for path in (root.parent / "services" / "validator").glob("*.py")]
    found = {kind for text in sources for kind in re.findall(r"\breport\(\s*\"(\w+)\"", text)}
    assert {"denied", "wrong_draw", "false_claim"} <= found
    assert found - counts | {offences.kind_of(reason) for reason in reasons_pb2.Reason.values()} <= {*offences.KINDS}


def test_where_the_key_stands_in_what_strangers_say() -> None:
    for subject, place in SAID.items():
        said = [KEY if at == place else "x" if part == "*" else part for at, part in enumerate(subject.split("."))]
        assert any(may_publish(role, ".".join(said)) for role in ("miner", "validator")), subject
        assert not any(may_publish(role, ".".join(said).replace(KEY, OTHER)) for role in ("miner", "validator"))


@pytest.mark.parametrize("role", [*SERVICES, *STRANGERS])
def test_only_the_operator_may_let_go_of_what_was_said(role: str) -> None:
    for name in streams.STREAMS:
        for verb in ("PURGE", "DELETE", "UPDATE", "MSG.DELETE", "SNAPSHOT", "RESTORE"):
            assert not may_publish(role, f"$JS.API.STREAM.{verb}.{name}")
    assert may_publish("operator", "$JS.API.STREAM.PURGE.TRAIN")


@pytest.mark.parametrize("name", streams.STREAMS)
def test_a_question_about_a_stream_is_told_in_words(name: str) -> None:
    """A miner was told that nobody answers `connito.asked.v1.RUNS.U…`: a subject of nobody's but this program's."""
    identity = Identity.generate()
    for by_desk in (False, True):
        connection = Connection("nats://there:4222", identity, "test")
        connection._by_desk = by_desk
        asked = connection.stored_in(name)
        lines = (str(connection.silent(asked)), str(connection.not_permitted(asked)))
        for line in lines:
            assert f" what stream {name} holds" in line
            assert identity.public not in line
            assert not re.search(r"connito\.|\$JS", line)

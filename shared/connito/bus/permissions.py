"""Rights of each key on the broker: least privilege, derived from the fact catalogue.

A signature says who wrote a message; these rights say who can put one on the wire at all. Services share one account. A key of
anybody else lies in accounts of strangers, in which there is nothing: no stream, no bucket, no API. What a stranger may ask for
or say is imported there one subject at a time, and the broker hands each answer to the account of the one who asked.

That matters because a client may name any subject for the reply, and the broker's own API answers there with the broker's
rights: whoever may ask it anything, in an account where streams listen, writes into every one of them. Those who speak and
those who read are apart for the same reason: an answer that a reader has sent elsewhere finds nothing that is passed on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from connito.bus.offences import KINDS
from connito.bus.streams import DURABLES, ENDPOINTS, FACT_STREAMS, LEASES, STREAMS, SUSPECTS, live
from connito.wire.parts import MAX_FACT_BYTES
from connito.wire.subjects import DLQ_ROOT, ROOT, SECURITY_ROOT, inbox_prefix
from connito.wire.verification import ANY, CATALOGUE, INGRESS, LARGE, WORKERS

# Everything that an audit of the log rests on: whoever takes part may make one.
READ_STREAMS = (*FACT_STREAMS, "INGRESS", "DLQ")
PLATFORM, SYSTEM = "platform", "system"
# Who answers strangers also sees that none of them takes all connections (`connito.bus.guard`).
GUARDS = ("committer",)
CONNECTED = "$SYS.ACCOUNT.*.CONNECT"
SERVERS = "$SYS.REQ.SERVER.PING.IDZ"
CONNECTIONS_OF, KICK = "$SYS.REQ.SERVER.{server}.CONNZ", "$SYS.REQ.SERVER.{server}.KICK"
# Strangers' questions come to whoever counts them (`connito.bus.desk`), and the broker answers each below its key.
ASKED, ANSWERED = "connito.asked.v1", "connito.answered.v1"
# Stands for the key of whoever logs in, in rights that are written down once for all keys of an account.
SELF = "{{subject()}}"

# Streams that each service follows, and the buckets and durables that some work on.
_STREAMS: dict[str, Sequence[str]] = {
    "coordinator": (*FACT_STREAMS, "INGRESS"),
    "selector": FACT_STREAMS,
    "committer": (*FACT_STREAMS, "INGRESS"),
    "aggregator": FACT_STREAMS,
    "library": FACT_STREAMS,
}
_HAS_API = {"coordinator", "committer", "library"}
_LEADS = {"coordinator", "aggregator", "committer"}
_DURABLES = {"committer": ("committer",), "selector": ("selector",), "library": ("library",)}

_HEADERS = 1 << 12
# A question names one subject. The broker would search for as many as fit, each in all of the stream's.
QUESTION = 512


@dataclass(frozen=True)
class Permissions:
    """Subjects a user may publish to and subscribe to."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """An account of strangers. `services` are answered by the platform's account, `heard` comes from there, `told` goes there.

    `grants` hold for each key in it, with `SELF` for the key. A connection has at most `subscriptions`, and sends messages of
    at most `payload` bytes. All keys of an account together have at most `connections` to a server: those of all accounts are
    fewer than a server takes, so that services get in whoever else knocks.
    """

    name: str
    role: str
    grants: Permissions
    services: tuple[str, ...]
    heard: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    payload: int = _HEADERS
    subscriptions: int = 64
    connections: int = 1_000


def permissions(role: str, key: str) -> Permissions:
    """Return the rights of `key` in the platform's account: as a service, or as `operator`, who may do everything there."""
    if role == "operator":
        return Permissions((">",), (">",))
    streams = _STREAMS[role]
    publish = [
        *_facts(role, "*"),
        *(_facts(ANY, key) if role in WORKERS else ()),
        *_reading(streams),
        *_buckets(role),
        f"{SECURITY_ROOT}.*.{key}",
    ]
    # Of the leader, which is never behind: where a stream ends, and whether a message is gone.
    publish += [f"$JS.API.STREAM.{question}.{stream}" for question in ("INFO", "MSG.GET") for stream in streams]
    durables = _DURABLES.get(role, ())
    publish += [subject for name in durables for subject in _durable(name)]
    if durables:
        # A dead letter that was written before a crash is read back, to see that it stands.
        publish += [f"{DLQ_ROOT}.>", *_reading(["DLQ"])]
    asked = (f"{ASKED}.*.*", f"{ROOT}.>", f"{SECURITY_ROOT}.>") if role in GUARDS else ()
    return Permissions(tuple(publish), (*asked, *_hearing(streams, key)))


def guarding(key: str) -> Permissions:
    """Return the rights of a guard in the server's own account: to hear who connects, to ask who is, to close a connection."""
    asks = (SERVERS, CONNECTIONS_OF.format(server="*"), KICK.format(server="*"))
    return Permissions(asks, (CONNECTED, f"{inbox_prefix(key)}.>"))


def _readers(name: str, role: str, streams: Sequence[str], connections: int) -> Account:
    hints = tuple(live(stream, ">") for stream in streams)
    asks = tuple(f"{ASKED}.{stream}.{SELF}" for stream in streams)
    grants = Permissions((*asks, *_endpoints()), (f"{ANSWERED}.{SELF}.>", *hints))
    told = (f"{ASKED}.*.*",)
    heard = (f"{ANSWERED}.*.>", *hints)
    return Account(name, role, grants, tuple(_endpoints()), heard, told, QUESTION, connections=connections)


def _speakers(name: str, role: str, said: Sequence[str], payload: int, connections: int) -> Account:
    grants = Permissions(tuple(said), (f"{inbox_prefix(SELF)}.>",))
    services = tuple(subject.replace(SELF, "*") for subject in said)
    return Account(name, role, grants, services, payload=payload + _HEADERS, subscriptions=8, connections=connections)


def _facts(role: str, id_: str) -> Iterable[str]:
    for (section, kind), (_, writer, id_path) in CATALOGUE.items():
        if writer == role:
            subject = f"{ROOT}.*.{section}.*.{kind}" + (f".{id_}" if id_path else "")
            yield subject
            if (section, kind) in LARGE:
                yield f"{subject}.part.*.*"


def _reading(streams: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"$JS.API.DIRECT.GET.{stream}" for stream in streams)


def _hearing(streams: Iterable[str], key: str) -> tuple[str, ...]:
    return (f"{inbox_prefix(key)}.>", *(live(stream, ">") for stream in streams))


def _endpoints() -> tuple[str, ...]:
    return (f"$JS.API.DIRECT.GET.KV_{ENDPOINTS}.$KV.{ENDPOINTS}.*",)


def _buckets(role: str) -> Iterable[str]:
    """Return the rights on buckets: all read ENDPOINTS, services with an API write their own entry, leaders hold leases."""
    yield from _endpoints()
    if role in _HAS_API:
        yield f"$KV.{ENDPOINTS}.{role}"
    if role in _LEADS:
        yield f"$JS.API.STREAM.INFO.KV_{LEASES}"
        yield f"$JS.API.DIRECT.GET.KV_{LEASES}.>"
        yield f"$KV.{LEASES}.{role}"


def _durable(name: str) -> Iterable[str]:
    """Yield the subjects with which a worker draws, acknowledges and suspects messages, without rights to change the consumer."""
    stream = DURABLES[name].stream
    yield f"$JS.API.CONSUMER.INFO.{stream}.{name}"
    yield f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}"
    yield f"$JS.ACK.{stream}.{name}.>"
    yield f"$KV.{SUSPECTS}.{name}.*"
    yield f"$JS.API.DIRECT.GET.KV_{SUSPECTS}.$KV.{SUSPECTS}.{name}.*"


_MINER_SAYS = [f"{ROOT}.*.ingress.{SELF}.{kind}" for kind in INGRESS]
_VALIDATOR_SAYS = [
    *_facts("validator", SELF),
    *_facts(ANY, SELF),
    *(f"{SECURITY_ROOT}.{kind}.{SELF}" for kind in KINDS),
]
# What strangers say, and the place of their key in the subject.
SAID = {said.replace(SELF, "*"): said.split(".").index(SELF) for said in (*_MINER_SAYS, *_VALIDATOR_SAYS)}

ACCOUNTS: dict[str, Account] = {
    account.name: account
    for account in (
        _speakers("miners-say", "miner", _MINER_SAYS, STREAMS["INGRESS"].max_message_bytes, 20_000),
        _readers("miners-read", "miner", READ_STREAMS, 20_000),
        _speakers("validators-say", "validator", _VALIDATOR_SAYS, MAX_FACT_BYTES, 1_000),
        _readers("validators-read", "validator", FACT_STREAMS, 1_000),
        _readers("customers", "customer", READ_STREAMS, 5_000),
    )
}


def accounts_of(role: str) -> tuple[str, ...]:
    """Return the accounts that a key of a role has a pass for: where it speaks first, where it reads last."""
    strangers = tuple(name for name, account in ACCOUNTS.items() if account.role == role)
    return strangers or ((PLATFORM, SYSTEM) if role in GUARDS else (PLATFORM,))

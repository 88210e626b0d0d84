"""Permissions of each key on the broker: least privilege, derived from the fact catalogue.

A signature says who wrote a message; these permissions say who can put one on the wire at all. A role publishes the
facts that `connito.wire.verification.CATALOGUE` gives it and nothing else, a validator and a miner only under their own key, and
everybody hears replies on an inbox of their own, so that nobody can listen to what the broker answers to others.

Reading a stream means creating a pull consumer on it and asking for messages. Whoever may do that could also change or
drain the durable consumers that services share on the same stream, hence the denials.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from connito.bus.streams import DURABLES, ENDPOINTS, FACT_STREAMS, LEASES
from connito.wire.subjects import DLQ_ROOT, ROOT, SECURITY_ROOT, inbox_prefix
from connito.wire.verification import CATALOGUE, INGRESS

# What a miner needs in order to take part: not what validators tell each other, nor what other miners say.
MINER_STREAMS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "MERGE")

# role -> streams it follows, key-value buckets it reads, buckets it writes, durables it works on.
_STREAMS: dict[str, Sequence[str]] = {
    "coordinator": (*FACT_STREAMS, "INGRESS"),
    "selector": FACT_STREAMS,
    "committer": (*FACT_STREAMS, "INGRESS"),
    "aggregator": FACT_STREAMS,
    "library": FACT_STREAMS,
    "validator": FACT_STREAMS,
    "customer": (*FACT_STREAMS, "INGRESS", "DLQ"),
    "miner": MINER_STREAMS,
}
_HAS_API = {"coordinator", "committer", "library"}
_LEADS = {"coordinator", "aggregator"}
_DURABLES = {"committer": ("committer",), "selector": ("selector",), "library": ("library",)}


@dataclass(frozen=True)
class Permissions:
    """Subjects a user may publish to and subscribe to; a denial wins over a grant."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    deny_publish: tuple[str, ...] = ()


def permissions(role: str, key: str) -> Permissions:
    """Return the permissions of `key` as `role`: one of the roster's roles, `miner`, or `operator` (everything)."""
    if role == "operator":
        return Permissions((">",), (">",))
    publish = [*_own_facts(role, key), *_reading(_STREAMS[role]), *_buckets(role)]
    durables = _DURABLES.get(role, ())
    publish += [subject for name in durables for subject in _durable(name)]
    if durables:
        # A dead letter that was written before a crash is read back, to see that it stands.
        publish += [f"{DLQ_ROOT}.>", "$JS.API.STREAM.MSG.GET.DLQ"]
    if role not in ("miner", "customer"):
        publish.append(f"{SECURITY_ROOT}.*.{key}")
    others = [name for name in DURABLES if name not in durables]
    return Permissions(tuple(publish), (f"{inbox_prefix(key)}.>",), tuple(_reach_into(others)))


def _own_facts(role: str, key: str) -> Iterable[str]:
    if role == "miner":
        yield from (f"{ROOT}.*.ingress.{key}.{kind}" for kind in INGRESS)
    for (section, kind), (_, writer, id_path) in CATALOGUE.items():
        if writer != role:
            continue
        tail = "" if not id_path else f".{key}" if role == "validator" else ".*"
        yield f"{ROOT}.*.{section}.*.{kind}{tail}"


def _reading(streams: Sequence[str]) -> Iterable[str]:
    for stream in streams:
        yield f"$JS.API.STREAM.INFO.{stream}"
        yield f"$JS.API.STREAM.MSG.GET.{stream}"
        yield f"$JS.API.CONSUMER.CREATE.{stream}.*.>"
        yield f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*"


def _buckets(role: str) -> Iterable[str]:
    """Return the permissions on buckets: all read ENDPOINTS, services with an API write their own entry, leaders hold leases."""
    yield from _read_bucket(ENDPOINTS)
    if role in _HAS_API:
        yield f"$KV.{ENDPOINTS}.{role}"
    if role in _LEADS:
        yield from _read_bucket(LEASES)
        yield f"$KV.{LEASES}.{role}"


def _read_bucket(bucket: str) -> Iterable[str]:
    yield f"$JS.API.STREAM.INFO.KV_{bucket}"
    yield f"$JS.API.DIRECT.GET.KV_{bucket}.>"


def _durable(name: str) -> Iterable[str]:
    """Yield the subjects with which a worker asks for and acknowledges messages, without rights to change the consumer."""
    stream = DURABLES[name].stream
    yield f"$JS.API.CONSUMER.INFO.{stream}.{name}"
    yield f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}"
    yield f"$JS.ACK.{stream}.{name}.>"


def _reach_into(durables: Iterable[str]) -> Iterable[str]:
    for name in durables:
        stream = DURABLES[name].stream
        yield f"$JS.API.CONSUMER.CREATE.{stream}.{name}.>"
        yield f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}"


def broker_user(role: str, key: str) -> dict[str, Any]:
    """Return a user of the broker with its role's permissions, in the server's own syntax."""
    granted = permissions(role, key)
    publish: dict[str, list[str]] = {"allow": list(granted.publish)}
    if granted.deny_publish:
        publish["deny"] = list(granted.deny_publish)
    return {"nkey": key, "permissions": {"publish": publish, "subscribe": {"allow": list(granted.subscribe)}}}

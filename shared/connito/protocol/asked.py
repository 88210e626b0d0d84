"""A run's rules are its customer's: what was written down when it was created, against what the customer signed."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message

from connito.errors import Invalid
from connito.protocol.policy.law import fill
from connito.v1 import reasons_pb2, run_pb2
from connito.wire.envelope import check
from connito.wire.identity import short_key

ORDER_SUBJECT = "rpc.CreateRun"


def check_asked(created: run_pb2.RunCreated) -> None:
    """Raise `Invalid` unless the run's customer signed for its rules. What it left out has to be the default."""
    opened, spec = check(created.order, ORDER_SUBJECT), created.spec
    if opened.signer != spec.customer:
        raise Invalid(
            f"the run is said to be {short_key(spec.customer)}'s, and {short_key(opened.signer)} asked for it",
            reason=reasons_pb2.REASON_NOT_PERMITTED,
        )
    asked = opened.read(run_pb2.RunSpec)
    if asked == spec:
        return
    fill(asked, opened.signer)
    # Which rules there were is the program's to say.
    asked.protocol_version, asked.selection.report_version = spec.protocol_version, spec.selection.report_version
    if other := next(_others(asked, spec), ""):
        raise Invalid(f"{other} is not what the customer asked for", reason=reasons_pb2.REASON_NOT_PERMITTED)


def _others(asked: Message, given: Message, path: str = "") -> Iterator[str]:
    for field in asked.DESCRIPTOR.fields:
        one, other, here = getattr(asked, field.name), getattr(given, field.name), f"{path}{field.name}"
        if isinstance(one, Message):
            yield from _others(one, other, f"{here}.")
        elif one != other:
            yield here

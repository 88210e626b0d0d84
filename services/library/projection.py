"""What has been deposited, in the order of the log."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

from connito.errors import Invalid, NotFound
from connito.facts import Fact
from connito.v1 import run_pb2, services_pb2

PAGE_SIZE = 50
MAX_PAGE_SIZE = 500


def summarise(fact: Fact) -> services_pb2.ExpertSummary:
    """One row of the catalogue."""
    message = fact.message
    assert isinstance(message, run_pb2.ExpertDeposited)
    return services_pb2.ExpertSummary(
        expert_id=message.expert_id,
        run=message.run,
        domain=message.domain,
        base_digest=message.base_digest,
        expert=message.expert,
        record=message.record,
        deposited_at_unix_ms=fact.time_unix_ms,
    )


@dataclass
class Catalogue:
    """Deposits by expert id. Adding a deposit twice, or in another order, makes no difference."""

    facts: dict[str, Fact] = field(default_factory=dict)

    def add(self, fact: Fact) -> None:
        """Insert a deposit; other facts are not the catalogue's. Of two runs with one expert, the first stands."""
        if isinstance(fact.message, run_pb2.ExpertDeposited):
            known = self.facts.get(fact.message.expert_id)
            if known is None or fact.sequence < known.sequence:
                self.facts[fact.message.expert_id] = fact

    def get(self, expert_id: str) -> services_pb2.ExpertSummary:
        """One expert. Raises `NotFound`."""
        fact = self.facts.get(expert_id)
        if fact is None:
            raise NotFound(f"there is no expert {expert_id!r} in this library; see `connito library list`")
        return summarise(fact)

    def page(self, size: int, token: str) -> tuple[list[services_pb2.ExpertSummary], str]:
        """Up to `size` experts after the one `token` stands for, oldest first, and the token of the next page.

        A token names the last sequence shown, so that deposits made between two pages shift nothing. `Invalid` for
        a token that is not one of ours.
        """
        after = _decode_token(token)
        size = min(size or PAGE_SIZE, MAX_PAGE_SIZE)
        rest = sorted((fact for fact in self.facts.values() if fact.sequence > after), key=lambda fact: fact.sequence)
        shown = rest[:size]
        following = _encode_token(shown[-1].sequence) if len(rest) > size else ""
        return [summarise(fact) for fact in shown], following


def _encode_token(sequence: int) -> str:
    return base64.urlsafe_b64encode(f"after:{sequence}".encode()).decode()


def _decode_token(token: str) -> int:
    if not token:
        return 0
    try:
        text = base64.urlsafe_b64decode(token.encode()).decode()
        prefix, _, number = text.partition(":")
        if prefix == "after" and number.isdecimal():
            return int(number)
    except ValueError:
        pass
    raise Invalid(
        f"{token!r} is not a page token of this library; take it from the previous page, or start without one"
    )

"""State of the library, in the order of the log: deposits, notices and uses in an index, with visibility."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from connito.errors import Invalid, NotFound
from connito.library.governance import Standing, Viewer, attribute
from connito.library.hits import Hit, search, visible
from connito.library.index import Index, LibraryEvent, deposit_event
from connito.library.scores import as_messages
from connito.v1 import run_pb2, services_pb2
from connito.wire.enums import plain_name
from connito.wire.fact import Fact

PAGE_SIZE = 50
# Of a number that the index can hold.
_MOST_DIGITS = 18
MAX_PAGE_SIZE = 500
# What a notice says of its subject, in the words of the index.
NOTICES = {kind: plain_name(run_pb2.NoticeKind, kind) for kind in run_pb2.NoticeKind.values() if kind}


def summarise(
    fact: Fact[run_pb2.ExpertDeposited], standing: Standing, record: Mapping[str, object]
) -> services_pb2.ExpertSummary:
    """Return one row of the catalogue."""
    message = fact.message
    return services_pb2.ExpertSummary(
        expert_id=message.expert_id,
        run=message.run,
        domain=message.domain,
        base_digest=message.base_digest,
        expert=message.expert,
        record=message.record,
        deposited_at_unix_ms=fact.time_unix_ms,
        files=message.files,
        status=standing.status,
        reason=standing.reason,
        scores=as_messages(record),
    )


def event_of(fact: Fact) -> LibraryEvent | None:
    """Return a notice or a use as an entry of the index; None for other facts."""
    message = fact.message
    if isinstance(message, run_pb2.ExpertNotice) and message.kind in NOTICES:
        body = {"reason": message.reason, "by": message.by}
        return LibraryEvent(fact.sequence, fact.time_unix_ms, NOTICES[message.kind], message.subject, body, fact.stream)
    if isinstance(message, run_pb2.ExpertUsed):
        use = {"verb": message.verb, "by": message.by, "units": int(message.units)}
        return LibraryEvent(fact.sequence, fact.time_unix_ms, "used", message.expert_id, use, fact.stream)
    return None


@dataclass
class Catalogue:
    """Deposits by expert id over the index. Adding a fact twice, or in another order, makes no difference.

    An expert that `viewer` may not see is answered as one that does not exist. `envelopes` are the deposits as signed.
    """

    index: Index = field(default_factory=Index)
    facts: dict[str, Fact[run_pb2.ExpertDeposited]] = field(default_factory=dict)
    envelopes: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def add(self, fact: Fact, record: bytes | None = None, envelope: tuple[str, bytes] | None = None) -> None:
        """Insert a fact of the library. Of two runs with one expert, the first stands.

        `record`: the bytes of a deposit's record; without them the expert is public and known by its domain alone.
        Raises `VerificationFailed` for another record than the one deposited.
        """
        deposit = fact.of(run_pb2.ExpertDeposited)
        if deposit is None:
            event = event_of(fact)
            self.index.apply([] if event is None else [event])
            return
        message = deposit.message
        if record is None:
            body = {"expert_id": message.expert_id, "domain": message.domain}
            event = LibraryEvent(fact.sequence, fact.time_unix_ms, "deposited", message.expert_id, body, fact.stream)
        else:
            event = deposit_event(deposit, record)
        self.index.apply([event])
        known = self.facts.get(message.expert_id)
        if known is None or fact.sequence < known.sequence:
            self.facts[message.expert_id] = deposit
            if envelope is not None:
                self.envelopes[message.expert_id] = envelope

    def fact(self, expert_id: str, viewer: Viewer | None = None) -> Fact[run_pb2.ExpertDeposited]:
        """Return the deposit of one expert. Raises `NotFound`."""
        fact = self.facts.get(expert_id)
        if fact is None or not (viewer or Viewer()).sees(self.index.record(expert_id)):
            raise NotFound(f"there is no expert {expert_id!r} in this library; see `connito library list`")
        return fact

    def get(self, expert_id: str, viewer: Viewer | None = None) -> services_pb2.ExpertSummary:
        """Return one expert. Raises `NotFound`."""
        return self._summary(self.fact(expert_id, viewer))

    def _summary(self, fact: Fact[run_pb2.ExpertDeposited]) -> services_pb2.ExpertSummary:
        name = fact.message.expert_id
        return summarise(fact, self.index.standing(name), self.index.record(name))

    def page(self, size: int, token: str, viewer: Viewer | None = None) -> tuple[list[services_pb2.ExpertSummary], str]:
        """Return up to `size` experts after the one `token` stands for, oldest first, and the token of the next page.

        A token names the last sequence shown, so that deposits made between two pages shift nothing. `Invalid` for
        a token that is not one of ours.
        """
        size = min(size or PAGE_SIZE, MAX_PAGE_SIZE)
        rest = visible(self.index, viewer or Viewer(), after=_decode_token(token, "after"), limit=size + 1)
        shown = [self.facts[name] for _, name in rest[:size] if name in self.facts]
        following = _encode_token("after", rest[size - 1][0]) if len(rest) > size else ""
        return [self._summary(fact) for fact in shown], following

    def search(
        self, request: services_pb2.SearchExpertsRequest, viewer: Viewer
    ) -> tuple[list[services_pb2.ExpertHit], str]:
        """Return a page of hits, best first, and the token of the next. Deposits between two pages may shift later
        ones.
        """
        size = min(request.page_size or PAGE_SIZE, MAX_PAGE_SIZE)
        start = _decode_token(request.page_token, "from")
        hits = search(
            self.index,
            request.text,
            domain=request.domain,
            base_digest=request.base_digest,
            viewer=viewer,
            everything=request.everything,
            limit=size + 1,
            offset=start,
        )
        return self._rows(hits[:size]), _encode_token("from", start + size) if len(hits) > size else ""

    def _rows(self, hits: Sequence[Hit]) -> list[services_pb2.ExpertHit]:
        return [
            services_pb2.ExpertHit(
                expert=self._summary(self.facts[hit.expert_id]),
                license=hit.license,
                saving=hit.saving,
                score=hit.score,
                status=hit.standing.status,
                reason=hit.standing.reason,
            )
            for hit in hits
            if hit.expert_id in self.facts
        ]

    def ledger(self, expert_id: str, viewer: Viewer) -> services_pb2.GetLedgerResponse:
        """Return the uses of experts and the miners that they are credited to. Raises `NotFound`."""
        self.fact(expert_id, viewer)
        uses = self.index.usage(expert_id)
        credit = attribute(self.index.record(expert_id), sum(uses.values()), self.index.lookup)
        return services_pb2.GetLedgerResponse(uses=uses, credited=credit.units, uncredited=credit.uncredited)

    def may_state(self, signer: str, kind: int, subject: str) -> bool:
        """Return whether `signer` owns the expert that is spoken about, or every expert that names the data source.

        Sources are named by customers: whoever names another's source does not get a say over the other's experts.
        """
        if kind in (run_pb2.NOTICE_KIND_OPTED_OUT, run_pb2.NOTICE_KIND_OPTED_IN):
            owners = self.index.select(
                "SELECT DISTINCT e.owner FROM sources s JOIN experts e USING (expert_id) WHERE s.source = ?", (subject,)
            )
        else:
            owners = self.index.select("SELECT owner FROM experts WHERE expert_id = ?", (subject,))
        return bool(owners) and all(owner == (signer,) for owner in owners)


def _encode_token(word: str, number: int) -> str:
    return base64.urlsafe_b64encode(f"{word}:{number}".encode()).decode()


def _decode_token(token: str, word: str) -> int:
    if not token:
        return 0
    try:
        text = base64.urlsafe_b64decode(token.encode()).decode()
        prefix, _, number = text.partition(":")
        if prefix == word and number.isdecimal() and len(number) <= _MOST_DIGITS:
            return int(number)
    except ValueError:
        pass
    raise Invalid(
        f"{token[:80]!r} is not a page token of this library; take it from the previous page, or start without one"
    )

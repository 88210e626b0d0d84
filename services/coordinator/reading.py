"""Check who may read runs at the API, and limit how much a key reads at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from connito.errors import Invalid, NotFound
from connito.library.governance import Viewer
from connito.runtime.limits import RateLimit
from connito.service.oidc import Tokens
from connito.service.rpc import authorization, check_fresh, open_request
from connito.v1 import reasons_pb2, services_pb2
from connito.wire.facts import RunFacts
from connito.wire.log import Log
from connito.wire.passes import admitted
from connito.wire.private import is_public
from connito.wire.roster import OPERATOR, ROLES, Roster

Request = services_pb2.GetRunRequest | services_pb2.ListRunsRequest | services_pb2.WatchRunRequest

READS_PER_SECOND, READS_AT_ONCE = 10.0, 100.0
STREAMS_PER_KEY = 8


def unknown(run: str) -> NotFound:
    """Return the answer about a run that there is not, or that the one who asks has no part in: the same words for both."""
    return NotFound(f"no run is called {run!r}; `connito job list` shows them", reason=reasons_pb2.REASON_UNKNOWN_RUN)


class Readers:
    """Keys that read: those of the roster, those that were admitted as miners, and those that take part in a run."""

    def __init__(self, log: Log, roster: Roster, clock: Callable[[], int], tokens: Tokens | None = None) -> None:
        self._log, self._roster, self._clock, self._tokens = log, roster, clock, tokens
        self._limit = RateLimit(READS_PER_SECOND, READS_AT_ONCE, time.monotonic)
        self._streams: Counter[str] = Counter()

    async def viewer(self, request: Request, context: Any) -> Viewer:
        """Return who reads, by key or by a provider's token, and count it.

        Raises `Invalid` (BAD_SIGNATURE, NOT_PERMITTED, QUOTA_EXCEEDED), `Retry` while the provider is away.
        """
        if self._tokens is not None and (viewer := await self._tokens.bearer(authorization(context))):
            self._limit.take(viewer.name)
            return viewer
        return self.by_key(self._key(request))

    def by_key(self, key: str) -> Viewer:
        """Return who a key is to those who show runs."""
        return Viewer(key, self._roster.memberships(key))

    def _key(self, request: Request) -> str:
        _, key = open_request(request.viewer, "rpc.ReadRuns", services_pb2.ReadRunsCommand)
        check_fresh(request.viewer, self._clock(), reasons_pb2.REASON_NOT_PERMITTED)
        # Before anything is kept about a key: fresh ones cost nothing.
        if not self._known(key, request.admission):
            raise Invalid(
                f"{key} has no part in this installation; ask its operator for a pass, or sign with a key that the roster "
                "names",
                reason=reasons_pb2.REASON_NOT_PERMITTED,
            )
        self._limit.take(key)
        return key

    def may(self, facts: RunFacts, viewer: Viewer) -> bool:
        """Return whether a run is shown to a viewer: a public one to all, another to who has a part in it or serves it."""
        spec = facts.spec
        if spec is None:
            return False
        key = viewer.name
        serves = viewer.everything or self._roster.serves(key)
        own = key == spec.customer or facts.is_enrolled(key) or key in spec.enrolment.allowed
        shared = spec.visibility == "organisation" and spec.organisation in viewer.organisations
        return is_public(spec) or serves or own or shared

    def run(self, run: str, viewer: Viewer) -> RunFacts:
        """Return the facts of a run that is shown to a viewer. Raises `NotFound`: for one that is not, as if there were none."""
        facts = self._log.runs.get(run)
        if facts is None or not self.may(facts, viewer):
            raise unknown(run)
        return facts

    @contextmanager
    def stream(self, key: str) -> Iterator[None]:
        """Count an answer that goes on, while it does. Raises `Invalid` (QUOTA_EXCEEDED) for one more than a key may have."""
        if self._streams[key] >= STREAMS_PER_KEY:
            raise Invalid(
                f"this key watches {STREAMS_PER_KEY} runs already; end one of them first",
                reason=reasons_pb2.REASON_QUOTA_EXCEEDED,
            )
        self._streams[key] += 1
        try:
            yield
        finally:
            self._streams[key] -= 1
            if not self._streams[key]:
                del self._streams[key]

    def _known(self, key: str, admission: str) -> bool:
        if any(self._roster.permits(role, key) for role in (*ROLES, OPERATOR)):
            return True
        if not self._roster.admits or admitted(admission, key, self._roster.admits):
            return True
        return any(facts.is_enrolled(key) for facts in self._log.runs.values())

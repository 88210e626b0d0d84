"""Artifacts that a key may read because of a run, and that the run may name at all. Pure.

Everybody who takes part reads the log, and so knows the digests in it: to name an artifact is no right to it. A run
entitles to what its own facts name, unless a run of another customer named that first and does not share it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from google.protobuf.message import Message

from connito.errors import Invalid
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.private import is_public
from connito.wire.subjects import LIBRARY

_PROOF_TAG = b"connito.v1.base\x00"


def for_miners(facts: RunFacts) -> Iterator[ArtifactRef]:
    """Yield what an enrolled miner trains from, but for the base: its files are named by the manifest."""
    spec, selection = facts.spec, facts.selection
    if spec is not None:
        yield from (spec.train.artifact, spec.replay.artifact)
    if selection is not None:
        yield from (selection.initial_state, selection.background, selection.report)
    for cycle in facts.cycles():
        opened = facts.window("train", cycle).opened
        if opened is not None:
            yield opened.state
            # The last version is not for miners, nor is the step to it.
            before = facts.version(cycle - 1)
            if before is not None:
                yield before.step


def for_customer(facts: RunFacts) -> Iterator[ArtifactRef]:
    """Yield what the customer of a run is owed: what it brought, and what the run made of it."""
    yield from for_miners(facts)
    spec, selection = facts.spec, facts.selection
    if spec is not None:
        yield from (corpus.artifact for corpus in corpora(spec))
    if selection is not None:
        yield from (selection.signature, *(row.record for row in selection.start.candidates))
    yield from (version.state for version in facts.versions.values())
    yield from for_viewers(facts)


def for_viewers(facts: RunFacts) -> Iterator[ArtifactRef]:
    """Yield what everybody reads who may see the expert of a run."""
    for fact in facts.deposits.values():
        yield from of_deposit(fact.message)


def of_deposit(message: run_pb2.ExpertDeposited) -> Iterator[ArtifactRef]:
    """Yield the artifacts that a deposit names."""
    yield from (message.expert, message.record, message.attestation, *message.files)


def corpora(spec: run_pb2.RunSpec) -> list[run_pb2.CorpusRef]:
    """Return every corpus of a run that has one, those that are held out last."""
    named = [spec.probe, spec.train, spec.replay, *spec.beside, spec.holdout, *spec.general_holdouts]
    return [corpus for corpus in (*named, *spec.benchmarks, *spec.tasks) if corpus.artifact.digest]


class Naming:
    """The runs that name each digest, in facts that were added in any order."""

    def __init__(self) -> None:
        # The first deposit of what no run made that names a digest, as of so many deposits.
        self._deposited, self._deposits = dict[str, Fact[run_pb2.ExpertDeposited]](), 0
        self._runs: defaultdict[str, set[str]] = defaultdict(set)
        self._digests: defaultdict[str, set[str]] = defaultdict(set)

    def add(self, fact: Fact) -> None:
        """Take over what a new fact names."""
        self.recall(fact.run, (ref.digest for ref in named(fact.message)))

    def recall(self, run: str, digests: Iterable[str]) -> None:
        """Take over what `of` returned of a run."""
        for digest in digests:
            self._runs[digest].add(run)
            self._digests[run].add(digest)

    def of(self, run: str) -> list[str]:
        """Return what the facts of a run name."""
        return sorted(self._digests.get(run, ()))

    def holder(self, digest: str, runs: Mapping[str, RunFacts]) -> run_pb2.RunSpec | None:
        """Return the spec of the run that was created first among those that name a digest, None where none does; of what was
        deposited before, by whoever made it without a run, one as if its owner's run had brought it.
        """
        created = [fact for run in self._runs.get(digest, ()) if (fact := runs[run].created_fact) is not None]
        first = min(created, key=lambda fact: fact.sequence, default=None)
        deposit = self._deposit(digest, runs.get(LIBRARY))
        if deposit is not None and (first is None or deposit.time_unix_ms < first.time_unix_ms):
            said = deposit.message
            return run_pb2.RunSpec(customer=said.owner, visibility=said.visibility, organisation=said.organisation)
        return None if first is None else first.message.spec

    def _deposit(self, digest: str, library: RunFacts | None) -> Fact[run_pb2.ExpertDeposited] | None:
        deposits = library.deposits if library is not None else {}
        if len(deposits) != self._deposits:
            self._deposited, self._deposits = {}, len(deposits)
            for fact in sorted(deposits.values(), key=lambda fact: fact.sequence):
                for ref in of_deposit(fact.message):
                    for name in filter(None, (ref.digest, ref.secret)):
                        self._deposited.setdefault(name, fact)
        return self._deposited.get(digest)

    def allows(self, ref: ArtifactRef, spec: run_pb2.RunSpec, runs: Mapping[str, RunFacts]) -> bool:
        """Return whether a spec may name an artifact: unless another customer's run did first and does not share it."""
        first = self.holder(ref.digest, runs)
        return first is None or _shares(first, spec, ref)

    def check(self, spec: run_pb2.RunSpec, runs: Mapping[str, RunFacts]) -> None:
        """Raise `Invalid` for a spec with a corpus, or a name of a base, that it may not use. Of its base the committer
        asks for proof.
        """
        if spec.secret.digest and not self.allows(spec.secret, spec, runs):
            raise Invalid("the run's secret is another customer's", reason=reasons_pb2.REASON_NOT_PERMITTED)
        for corpus in corpora(spec):
            if not self.allows(corpus.artifact, spec, runs):
                raise Invalid(
                    f"the corpus {corpus.artifact.digest[:12]}… ({corpus.domain}) is another customer's; submit your own",
                    reason=reasons_pb2.REASON_NOT_PERMITTED,
                )
        base = spec.base
        if (free := free_base_name(base.name, base.manifest.digest, spec.customer, runs.values())) != base.name:
            raise Invalid(
                f"the name {base.name!r} belongs to another base than the manifest {base.manifest.digest[:12]}…; "
                f"call it for example {free}",
                reason=reasons_pb2.REASON_BAD_SPEC,
            )


def base_proof(customer: str, manifest: bytes) -> bytes:
    """Return the proof that a customer has a base's manifest, of which the log says the digest alone."""
    return hashlib.sha256(_PROOF_TAG + customer.encode() + manifest).digest()


def named(message: Message) -> Iterator[ArtifactRef]:
    """Yield the artifacts that a fact brings into the log; nothing for a fact that only repeats them."""
    if isinstance(message, run_pb2.RunCreated):
        yield message.spec.base.manifest
        if message.spec.secret.digest:
            yield message.spec.secret
        yield from (corpus.artifact for corpus in corpora(message.spec))
    elif isinstance(message, run_pb2.SelectionMade):
        yield from (message.initial_state, message.background, message.report, message.signature)
    elif isinstance(message, cycle_pb2.VersionPublished):
        yield from (message.state, message.outer_state, message.step)
    elif isinstance(message, run_pb2.ExpertDeposited):
        yield from of_deposit(message)


def free_base_name(name: str, manifest: str, customer: str, runs: Iterable[RunFacts]) -> str:
    """Return the name, or one that says the digest as well where another customer gave it to another base first."""
    created = [fact for facts in runs if (fact := facts.created_fact) is not None]
    specs = [fact.message.spec for fact in sorted(created, key=lambda fact: fact.sequence)]
    first = next((spec for spec in specs if spec.base.name == name), None)
    free = first is None or first.customer == customer or first.base.manifest.digest == manifest
    return name if free else f"{name}-{manifest[:12]}"


def _shares(first: run_pb2.RunSpec, spec: run_pb2.RunSpec, ref: ArtifactRef) -> bool:
    """Return whether what one run brought may be used by another: its own customer's, or public and not held out."""
    public = is_public(first) and ref.realm == REALM_PUBLIC
    return public or first.customer == spec.customer

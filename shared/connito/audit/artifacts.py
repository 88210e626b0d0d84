"""The objects that a run's log names, each by what it is, fetched once and hashed; nothing is taken on trust."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from connito.audit.differences import NOBODY, Difference, Step
from connito.audit.evidence import Evidence
from connito.data.manifest import Manifest
from connito.errors import Invalid
from connito.library.start import deposits, wants_start
from connito.protocol.findings import OF_THE_FILE, check_version
from connito.protocol.retention import horizon
from connito.runtime.progress import Notify, silent
from connito.store.named import beside
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.identity import Identity
from connito.wire.sealing import MEDIA_TYPE as SEALED
from connito.wire.sealing import NoKey, unsealed
from connito.workloads.fetching import Source


@dataclass(frozen=True)
class Named:
    """An artifact, what it is, and the cycle it belongs to (0: the run). `miner`: whose submission it is."""

    what: str
    ref: ArtifactRef
    cycle: int = 0
    miner: str = ""

    def __str__(self) -> str:
        return f"{self.what} ({self.ref.digest[:12]}…)"


@dataclass
class Artifacts:
    """Fetched artifacts: files by digest, and the reasons for missing ones."""

    paths: dict[str, Path] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    named: list[Named] = field(default_factory=list)
    # Whose key opens what is sealed, and the customer who sealed it.
    me: Identity | None = None
    owner: str = ""

    def path(self, ref: ArtifactRef) -> Path:
        """Return the file, in clear. Raises `Invalid` when it could not be had: what needs it cannot be recomputed."""
        if ref.digest not in self.paths:
            why = self.damaged.get(ref.digest, "was never fetched")
            raise Invalid(f"the artifact {ref.digest[:12]}… {why}")
        return unsealed(self.paths[ref.digest], ref, self.me, self.owner)

    def check_key(self) -> None:
        """Raise `NoKey` where something is sealed that the auditor's key does not open: it says nothing of the run."""
        for entry in self.named:
            if entry.ref.media_type == SEALED and entry.ref.digest in self.paths:
                try:
                    self.path(entry.ref)
                except NoKey:
                    raise
                except Invalid:
                    continue  # A check says so.

    def step(self, check: str = "artifacts", miner: str = "") -> Step:
        """Check that every object has the digest that the log names."""
        about = [entry for entry in self.named if not miner or entry.miner in ("", miner)]
        found = [
            Difference(check, str(entry), self.damaged[entry.ref.digest], entry.cycle, entry.miner)
            for entry in about
            if entry.ref.digest in self.damaged
        ]
        found += [
            # It is this machine's own, and nobody reads it unhashed: neither log nor store are another for it.
            Difference(check, f"{entry}, cached copy", self.copies[entry.ref.digest], entry.cycle, entry.miner, NOBODY)
            for entry in about
            if entry.ref.digest in self.copies
        ]
        return Step(check, 0, len({entry.ref.digest for entry in about}), tuple(found))


def named(evidence: Evidence) -> Iterator[Named]:
    """Yield the artifacts that the facts of a run name, in the order of the run."""
    facts = evidence.facts
    if facts.spec is not None:
        yield from _of_spec(facts.spec)
    if facts.selection is not None:
        yield Named("selection report", facts.selection.report)
        yield Named("initial state θ_0", facts.selection.initial_state)
        if facts.selection.HasField("signature"):
            yield Named("routing signature", facts.selection.signature)
        yield from _considered(evidence)
        for candidate in facts.selection.start.candidates:
            yield Named("expert to start from", candidate.expert)
            yield Named("record of the expert to start from", candidate.record)
        if facts.selection.background.digest:
            yield Named("background experts", facts.selection.background)
    kept = horizon(facts)
    for cycle in facts.cycles():
        settled, version = facts.window("submit", cycle).settled, facts.version(cycle)
        # The first cycle that is kept began from what the one before left, and looks back at its submissions.
        if cycle + 1 < kept:
            continue
        for entry in settled.submissions if settled is not None else ():
            yield Named(f"submission of {evidence.name(entry.miner)}", entry.artifact, cycle, entry.miner)
            # That of the first cycle is no version's; of the first that is kept, none of a kept one's.
            if entry.base_state.digest and cycle <= kept:
                yield Named("state that it began from", entry.base_state, cycle)
        if version is not None:
            yield Named(f"state of version {version.version}", version.state, cycle)
            yield Named(f"outer state of version {version.version}", version.outer_state, cycle)
            if version.HasField("step"):
                yield Named(f"coded step of version {version.version}", version.step, cycle)
    for fact in facts.deposits.values():
        yield Named("library expert", fact.message.expert)
        yield Named("record of the library expert", fact.message.record)
        if fact.message.HasField("attestation"):
            yield Named("attestation of the library expert", fact.message.attestation)
        for file in fact.message.files:
            yield Named("file of the library model", file)


def _considered(evidence: Evidence) -> Iterator[Named]:
    """Yield every expert that the run may have started from, since an omitted one has to be found."""
    spec, made = evidence.facts.spec, evidence.facts.selection
    if spec is None or made is None or not wants_start(spec):
        return
    with suppress(Invalid):
        for deposit in deposits(evidence.library, spec, made.start.library_sequence):
            yield Named(f"library expert {deposit.expert_id}", deposit.expert)
            yield Named(f"record of {deposit.expert_id}", deposit.record)


def _of_spec(spec: run_pb2.RunSpec) -> Iterator[Named]:
    yield Named("base manifest", spec.base.manifest)
    corpora = [("probe", spec.probe), ("training", spec.train), ("hold-out", spec.holdout)]
    corpora += [("hold-out", corpus) for corpus in spec.general_holdouts]
    corpora += [("benchmark", corpus) for corpus in (*spec.benchmarks, *spec.tasks)]
    corpora += [("replay", spec.replay)] if spec.HasField("replay") else []
    corpora += [("probe", corpus) for corpus in spec.beside]
    for use, corpus in corpora:
        yield Named(f"{use} corpus of {corpus.domain}", corpus.artifact)
    if spec.secret.digest:
        yield Named("the run's secret", spec.secret)


def refused_reveals(evidence: Evidence) -> Iterator[Named]:
    """Yield the artifacts of reveals that were refused for their content; they are examined where they still exist."""
    for cycle in evidence.facts.cycles():
        for fact in evidence.facts.window("submit", cycle).refused.values():
            refused = fact.message
            said = evidence.said.get(refused.ingress_sequence) if refused.reason in OF_THE_FILE else None
            if said is not None and isinstance(said.message, cycle_pb2.Reveal):
                name = evidence.name(refused.miner)
                yield Named(f"refused artifact of {name}", said.message.artifact, cycle, refused.miner)


async def gather(
    evidence: Evidence,
    source: Source,
    *,
    wanted: Callable[[Named], bool] = lambda _: True,
    copy_of: Callable[[ArtifactRef], Path] | None = None,
    me: Identity | None = None,
    say: Notify = silent,
) -> Artifacts:
    """Fetch everything that the log names, and what those artifacts name in turn.

    Raises `Retry` while the store is away, and `Invalid` for a run under other rules: those say what its log names.

    `wanted` leaves some out, `copy_of` says where a local cache would keep an artifact; a copy that is there is hashed as well,
    `me` opens what is sealed.
    """
    if evidence.facts.spec is not None:
        check_version(evidence.facts.spec)
    found = Artifacts(me=me, owner="" if evidence.facts.spec is None else evidence.facts.spec.customer)
    for entry in filter(wanted, named(evidence)):
        await _take(found, entry, source, copy_of, say)
        for inner in _inside(entry, found):
            await _take(found, inner, source, copy_of, say)
    for entry in filter(wanted, refused_reveals(evidence)):
        if entry.ref.digest not in found.paths and entry.ref.digest not in found.damaged:
            try:
                found.paths[entry.ref.digest] = await source.fetch(entry.ref)
            except Invalid:
                say(f"{entry} is not in the store")
    return found


async def _take(
    found: Artifacts, entry: Named, source: Source, copy_of: Callable[[ArtifactRef], Path] | None, say: Notify
) -> None:
    found.named.append(entry)
    digest = entry.ref.digest
    if digest in found.paths or digest in found.damaged:
        return
    say(f"hashing {entry}")
    copy = None
    try:
        copy = copy_of(entry.ref) if copy_of is not None else None
        found.paths[digest] = await source.fetch(entry.ref)
    except Invalid as error:
        found.damaged[digest] = str(error)
    if copy is not None and copy.exists():
        from connito.store import ref_of_file

        seen = ref_of_file(copy, "", entry.ref.realm)
        if seen.digest != digest:
            found.copies[digest] = f"{copy} hashes to {seen.digest[:12]}…; delete it, it is fetched again when needed"


def _inside(entry: Named, found: Artifacts) -> Iterator[Named]:
    """Yield the artifacts that an artifact names: a manifest its files, a report its statistics, a record its card."""
    path = found.paths.get(entry.ref.digest)
    if path is None:
        return
    if entry.what == "base manifest":
        for name, file in Manifest.load(path).files.items():
            yield Named(f"base model's {name}", file.ref)
    if entry.what in ("selection report", "record of the library expert"):
        yield from _named_by(entry, json.loads(path.read_bytes()), path)


def _named_by(entry: Named, document: dict[str, object], path: Path) -> Iterator[Named]:
    """Yield digests that the log names without a size; the store tells the size, and the bytes are hashed all the same."""
    statistics, card = document.get("statistics"), document.get("card")
    if isinstance(statistics, str):
        yield Named("routing statistics", beside(entry.ref, statistics))
    if isinstance(card, dict):
        yield Named("card of the library expert", beside(entry.ref, card["digest"], card["bytes"]))

"""Downloads that a run entitles a key to: what the run's facts name, and the files of its base."""

from __future__ import annotations

from collections import OrderedDict

from connito.data.manifest import Manifest
from connito.errors import Invalid, NotFound
from connito.library.governance import Viewer
from connito.protocol import bans
from connito.protocol.entitlement import base_proof, for_customer, for_miners, for_viewers, of_deposit
from connito.store import ArtifactStore
from connito.v1 import reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views.sentences import sentence
from connito.wire.facts import RunFacts
from connito.wire.private import is_public
from connito.wire.subjects import LIBRARY

from .judging import check_shown
from .state import State

REMEMBERED = 64


class Downloads:
    """Judges requests by the facts of every run. Manifests are read once."""

    def __init__(self, state: State, store: ArtifactStore) -> None:
        self._state, self._store = state, store
        self._manifests: OrderedDict[str, tuple[bytes, Manifest]] = OrderedDict()

    async def entitled(self, facts: RunFacts, key: str) -> dict[str, ArtifactRef]:
        """Return by digest what a key may read because of a run. Raises `Invalid` for one that has no part in it."""
        if facts.run == LIBRARY:
            return self._derived(facts, key)
        spec = facts.require_spec()
        if key == spec.customer:
            refs = for_customer(facts)
        elif self._sees(spec, key):
            refs = for_viewers(facts)
        else:
            check_shown(facts, key)
            _check_miner(facts, key)
            refs = for_miners(facts)
        found = {ref.digest: ref for ref in refs if ref.digest}
        for corpus in (spec.train, spec.replay):
            if not self._state.naming.allows(corpus.artifact, spec, self._state.runs):
                found.pop(corpus.artifact.digest, None)
        return found | await self._base(spec)

    def _derived(self, facts: RunFacts, key: str) -> dict[str, ArtifactRef]:
        """Return what customers derived from experts, as far as a key may see it. Who deposits names files, and to name what
        another brought is no right to it."""
        viewer = Viewer(key, self._state.roster.memberships(key))
        if not self._state.roster.permits("customer", key):
            return {}
        found = dict[str, ArtifactRef]()
        for fact in facts.deposits.values():
            said = fact.message
            rules = {"owner": said.owner, "visibility": said.visibility, "organisation": said.organisation}
            if viewer.sees({"governance": rules}):
                named = (ref for ref in of_deposit(said) if ref.digest)
                owner, allows = run_pb2.RunSpec(customer=said.owner), self._state.naming.allows
                found |= {ref.digest: ref for ref in named if allows(ref, owner, self._state.runs)}
        return found

    def _sees(self, spec: run_pb2.RunSpec, key: str) -> bool:
        """Return whether a key is another customer's that may see what came out of the run."""
        roster = self._state.roster
        if spec.visibility == "organisation" and spec.organisation in roster.memberships(key):
            return True
        return is_public(spec) and roster.permits("customer", key)

    async def _base(self, spec: run_pb2.RunSpec) -> dict[str, ArtifactRef]:
        """Return manifest and files of a run's base. Nothing where it is another customer's and the run shows no proof."""
        ref = spec.base.manifest
        try:
            raw, manifest = await self._manifest(ref)
        except (Invalid, NotFound):
            return {}
        allowed = self._state.naming.allows(ref, spec, self._state.runs)
        if not allowed and spec.base.proof != base_proof(spec.customer, raw):
            return {}
        files = [entry.ref for entry in manifest.files.values()]
        own = [file for file in files if self._state.naming.allows(file, spec, self._state.runs)]
        return {file.digest: file for file in (ref, *own)}

    async def _manifest(self, ref: ArtifactRef) -> tuple[bytes, Manifest]:
        known = self._manifests.get(ref.digest)
        if known is None:
            raw = await self._store.get_bytes(ref)
            known = self._manifests[ref.digest] = (raw, Manifest.from_bytes(raw))
            if len(self._manifests) > REMEMBERED:
                self._manifests.popitem(last=False)
        return known


def _check_miner(facts: RunFacts, miner: str) -> None:
    ban = bans.standing(facts, miner)
    if ban is not None and not ban.lifted:
        raise Invalid(sentence(bans.refusal(ban).finding), reason=reasons_pb2.REASON_BANNED)
    if not facts.is_enrolled(miner):
        raise Invalid(
            f"you are not enrolled in run {facts.run}; `connito miner run` enrols you",
            reason=reasons_pb2.REASON_NOT_ENROLLED,
        )

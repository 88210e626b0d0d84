"""A run whose windows are opened and closed by hand, for the committer's judgements."""

from __future__ import annotations

from connito.protocol.commitment import commitment_digest
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef
from connito.wire.fact import Fact

from tests.support import run as support
from tests.support.run import RUN, Run

__all__ = ["RUN", "SALT", "SIZE", "Ledger", "artifact", "opening", "theta"]

SIZE = 100_000
SALT = b"s" * 32


def theta(cycle: int) -> ArtifactRef:
    """The state that a cycle starts from."""
    return support.theta(cycle, SIZE)


def artifact(miner: str, cycle: int, size: int = SIZE) -> ArtifactRef:
    """What `miner` made in `cycle`."""
    digest = (miner.encode().hex() + f"{cycle:04x}").ljust(64, "f")
    return ArtifactRef(digest=digest, size=size, realm=REALM_SUBMISSION)


def opening(miner: str, cycle: int, made: ArtifactRef | None = None, base: ArtifactRef | None = None) -> bytes:
    """The digest that commits to it."""
    base = base or theta(cycle)
    return commitment_digest(RUN, cycle, miner, base.digest, (made or artifact(miner, cycle)).digest, SALT)


class Ledger(Run):
    """Keeps what miners revealed, accepted or not."""

    def __init__(self, cycles: int = 3) -> None:
        super().__init__(step_ms=1000)
        self.reveals: dict[int, Fact] = {}
        self.created(cycles=cycles).selected(initial_state=theta(1))

    def state(self, cycle: int) -> ArtifactRef:
        return theta(cycle)

    def commitment(self, miner: str, cycle: int, digest: bytes | None = None) -> Fact:
        return self.hear(miner, "commitment", cycle, digest=opening(miner, cycle) if digest is None else digest)

    def reveal(
        self,
        miner: str,
        cycle: int,
        made: ArtifactRef | None = None,
        base: ArtifactRef | None = None,
        salt: bytes = SALT,
    ) -> Fact:
        opened = {"artifact": made or artifact(miner, cycle), "base_state_digest": (base or theta(cycle)).digest}
        said = self.hear(miner, "reveal", cycle, **opened, salt=salt)
        self.reveals[said.sequence] = said
        return said

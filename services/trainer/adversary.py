"""Misbehaving miners, for drills: each one breaks a single rule and is honest otherwise.

They show that the protocol holds: what becomes of each is written beside it. Never run one against a network that is
not your own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from connito.errors import Fatal, Invalid, Retry
from connito.protocol.coding import decoded
from connito.protocol.policy.choices import ADVERSARIES
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import RunFacts
from connito.wire.locked import unlocked

from .settings import TrainerSettings
from .state import read_progress
from .strategy import HONEST, Effort, Strategy, Work

if TYPE_CHECKING:
    import torch

# A copy that was stretched gains more than its original while local steps are few.
STRETCH = 1.5
# Lengths of the state that a submission of `large-norm` moves by.
LEAP = 10.0


class _Idle(Strategy):
    """Does no work of its own, so it has a result at once."""

    async def produce(self, work: Work) -> Effort:
        self.forge(work)
        return Effort(work.policy.local_steps, 0, 0.0)

    def forge(self, work: Work) -> None:
        """Write `work.draft` without training."""
        raise NotImplementedError


class Copier(_Idle):
    """Takes a victim's result, leaked through its work folder, once the victim's commitment has been accepted.

    The commitment is valid, for it names the copier. The later commitment of two like deltas loses: `copy`.
    """

    name = "copier"

    def __init__(self, victim_dir: Path) -> None:
        self.victim_dir = victim_dir
        self._victim = ""

    def may_produce(self, facts: RunFacts, cycle: int) -> bool:
        victim = self.victim()
        return bool(victim) and victim in facts.commitments(cycle)

    def may_say_trained(self, facts: RunFacts, cycle: int, *, has_result: bool) -> bool:
        """Return a false answer that keeps the commit window open until the victim has committed."""
        return facts.window("train", cycle).opened is not None and facts.window("train", cycle).closed is None

    def victim(self) -> str:
        """Return the victim's public key; empty while its work folder is not there."""
        path = self.victim_dir / "miner"
        if not self._victim and path.exists():
            self._victim = path.read_text().strip()
        return self._victim

    def forge(self, work: Work) -> None:
        shutil.copyfile(self.stolen(work), work.draft)

    def stolen(self, work: Work) -> Path:
        """Return the rows of the victim's result of this cycle. Raises `Retry` while it is not there."""
        folder = self.victim_dir / work.run / str(work.cycle)
        path = folder / "artifact.safetensors"
        mine = read_progress(folder / "progress.json") if path.exists() else None
        if mine is None or not mine.artifact:
            raise Retry(f"the victim has no result in {folder} yet", after=0.5)
        ref = ArtifactRef(digest=mine.artifact, key=bytes.fromhex(mine.key), content=mine.content)
        return decoded(unlocked(path, ref, work.draft.parent), work.state, work.policy, work.draft.parent)


class NoisyCopier(Copier):
    """A copier that blurs what it took, so that its digest differs. Similarity of the deltas gives it away: `copy`."""

    name = "noisy-copier"
    # Of the delta's norm, per tensor: too little to hide a copy, enough that its digest differs.
    noise = 0.01

    def forge(self, work: Work) -> None:
        from connito.moe.state import load_state

        start, taken = load_state(work.state), load_state(self.stolen(work))
        sizes = {name: float((taken[name] - start[name]).float().norm()) * self.noise for name in taken}
        _write(work, taken, lambda name, tensor: _noise(tensor, sizes[name], work, name))


class MaskedCopier(NoisyCopier):
    """A copier under so much noise that the directions are no longer alike, for nothing in utility.

    What it does to every held-out sequence is what its victim does: `copy`.
    """

    name = "masked-copier"
    noise = 1.0


class ScaledCopier(Copier):
    """A copier that goes further into its victim's direction. Length hides nothing: `copy`."""

    name = "scaled-copier"

    def forge(self, work: Work) -> None:
        from connito.moe.state import load_state

        start, taken = load_state(work.state), load_state(self.stolen(work))
        _write(work, start, lambda name, tensor: STRETCH * (taken[name] - tensor))


class MixedCopier(Copier):
    """A copier of two, half of each: better than either and like neither. It lies in their span: `copy`."""

    name = "mixed-copier"

    def __init__(self, victim_dir: Path, second_dir: Path) -> None:
        super().__init__(victim_dir)
        self._second = Copier(second_dir)

    def may_produce(self, facts: RunFacts, cycle: int) -> bool:
        return super().may_produce(facts, cycle) and self._second.may_produce(facts, cycle)

    def forge(self, work: Work) -> None:
        from connito.moe.state import load_state

        one, other = load_state(self.stolen(work)), load_state(self._second.stolen(work))
        _write(work, one, lambda name, tensor: 0.5 * (other[name] - tensor))


class SignFlip(Strategy):
    """Trains, and hands in the opposite. It raises the loss: `no-improvement`."""

    name = "sign-flip"

    async def produce(self, work: Work) -> Effort:
        from connito.moe.state import load_state

        effort = await work.train()
        start, trained = load_state(work.state), load_state(work.draft)
        _write(work, start, lambda name, tensor: tensor - trained[name])
        return effort


class LargeNorm(Strategy):
    """Trains, and goes ten times the state's own length in that direction: `norm-exceeded`."""

    name = "large-norm"

    async def produce(self, work: Work) -> Effort:
        from connito.moe.state import load_state

        effort = await work.train()
        start, trained = load_state(work.state), load_state(work.draft)

        def leap(name: str, tensor: torch.Tensor) -> torch.Tensor:
            moved = trained[name] - tensor
            return moved * (LEAP * float(tensor.norm()) / max(float(moved.norm()), 1e-12))

        _write(work, start, leap)
        return effort


class FreeRider(_Idle):
    """Hands in the cycle's own state. It changes nothing, so it improves nothing: `unchanged`."""

    name = "freerider"

    def forge(self, work: Work) -> None:
        shutil.copyfile(work.state, work.draft)


class Noise(_Idle):
    """θ_t plus random noise as large as an honest delta: lr · H / 2 per element. It does not lower the loss."""

    name = "noise"

    def forge(self, work: Work) -> None:
        from connito.moe.state import load_state

        step = work.policy.learning_rate * work.policy.local_steps / 2
        state = load_state(work.state)
        _write(work, state, lambda name, tensor: _noise(tensor, step * tensor.numel() ** 0.5, work, name))


class NaN(_Idle):
    """A state with a value that is not a number: `non-finite`."""

    name = "nan"

    def forge(self, work: Work) -> None:
        from connito.moe.state import load_state, save_state

        state = load_state(work.state)
        name = next(iter(state))
        damaged = state[name].clone()
        damaged.view(-1)[0] = float("nan")
        save_state({**state, name: damaged}, work.draft)


class Oversized(Strategy):
    """Adds a tensor as large as all others together: no upload slot is given (`oversized`). It reveals anyway."""

    name = "oversized"

    async def produce(self, work: Work) -> Effort:
        import torch
        from connito.moe.state import load_state, save_state

        effort = await work.train()
        state = load_state(work.draft)
        extra = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) + (1 << 20)
        save_state({**state, "layers.0.ballast": torch.zeros(extra, dtype=torch.uint8)}, work.draft)
        return effort

    def reveals_after(self, refusal: Invalid) -> bool:
        return True


class Late(Strategy):
    """Uploads and reveals only after the submit window has closed: `late-reveal`, and scored in the next cycle."""

    name = "late"

    def may_reveal(self, facts: RunFacts, cycle: int) -> bool:
        return facts.window("submit", cycle).closed is not None


def choose(settings: TrainerSettings) -> Strategy:
    """Return the strategy that the settings name. Raises `Fatal` for an unknown one, or a copier without a victim."""
    name, victim = settings.trainer_adversary, settings.trainer_victim_dir
    second = settings.trainer_second_victim_dir or victim
    if not name:
        return HONEST
    kinds = (Copier, NoisyCopier, MaskedCopier, ScaledCopier)
    copiers: dict[str, Callable[[Path], Strategy]] = {kind.name: kind for kind in kinds}
    if name in copiers or name == MixedCopier.name:
        if victim is None or second is None:
            raise Fatal(f"the {name} needs CONNITO_TRAINER_VICTIM_DIR, the work folder of the miner it takes from")
        return copiers[name](victim) if name in copiers else MixedCopier(victim, second)
    solo = (FreeRider, Noise, NaN, Oversized, Late, SignFlip, LargeNorm)
    others: dict[str, Callable[[], Strategy]] = {kind.name: kind for kind in solo}
    if name not in others:
        raise Fatal(f"CONNITO_TRAINER_ADVERSARY is {name!r}; known: {', '.join(ADVERSARIES)}")
    return others[name]()


def _write(work: Work, state: dict[str, torch.Tensor], noise: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    from connito.moe.state import save_state

    save_state({name: tensor + noise(name, tensor) for name, tensor in state.items()}, work.draft)


def _noise(like: torch.Tensor, norm: float, work: Work, name: str) -> torch.Tensor:
    """Return gaussian noise of an exact Frobenius norm, the same whenever the same miner makes it."""
    import hashlib

    import torch

    seed = hashlib.sha256(f"{work.run}/{work.cycle}/{work.miner}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
    drawn = torch.randn(like.shape, generator=generator)
    return (drawn * (norm / float(drawn.norm()))).to(like.dtype)

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
from connito.facts import RunFacts

from services.trainer.settings import TrainerSettings
from services.trainer.state import read_progress
from services.trainer.strategy import HONEST, Effort, Strategy, Work

if TYPE_CHECKING:
    import torch

# Of the delta's norm, per tensor: too little to hide a copy, enough that its digest differs.
COPY_NOISE = 0.01


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
        return bool(victim) and facts.has("commit", cycle, "accepted", victim)

    def may_say_trained(self, facts: RunFacts, cycle: int, *, has_result: bool) -> bool:
        """A lie that keeps the commit window open until the victim has committed."""
        return facts.opened("train", cycle) is not None and facts.closed("train", cycle) is None

    def victim(self) -> str:
        """The victim's public key; empty while its work folder is not there."""
        path = self.victim_dir / "miner"
        if not self._victim and path.exists():
            self._victim = path.read_text().strip()
        return self._victim

    def forge(self, work: Work) -> None:
        shutil.copyfile(self.stolen(work), work.draft)

    def stolen(self, work: Work) -> Path:
        """The victim's result of this cycle. Raises `Retry` while it is not there."""
        folder = self.victim_dir / work.run / str(work.cycle)
        path = folder / "artifact.safetensors"
        if not path.exists() or not read_progress(folder / "progress.json").artifact:
            raise Retry(f"the victim has no result in {folder} yet", after=0.5)
        return path


class NoisyCopier(Copier):
    """A copier that blurs what it took, so that its digest differs. Similarity of the deltas gives it away: `copy`."""

    name = "noisy-copier"

    def forge(self, work: Work) -> None:
        from connito.moe.state import load_state

        start, taken = load_state(work.state), load_state(self.stolen(work))
        sizes = {name: float((taken[name] - start[name]).float().norm()) * COPY_NOISE for name in taken}
        _write(work, taken, lambda name, tensor: _noise(tensor, sizes[name], work, name))


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
        return facts.closed("submit", cycle) is not None


def choose(settings: TrainerSettings) -> Strategy:
    """The strategy that the settings name. Raises `Fatal` for an unknown one, or a copier without a victim."""
    name, victim = settings.trainer_adversary, settings.trainer_victim_dir
    if not name:
        return HONEST
    copiers: dict[str, Callable[[Path], Strategy]] = {"copier": Copier, "noisy-copier": NoisyCopier}
    if name in copiers:
        if victim is None:
            raise Fatal(f"the {name} needs CONNITO_TRAINER_VICTIM_DIR, the work folder of the miner it takes from")
        return copiers[name](victim)
    others: dict[str, Callable[[], Strategy]] = {kind.name: kind for kind in (FreeRider, Noise, NaN, Oversized, Late)}
    if name not in others:
        raise Fatal(f"CONNITO_TRAINER_ADVERSARY is {name!r}; known: {', '.join(sorted({*copiers, *others}))}")
    return others[name]()


def _write(work: Work, state: dict[str, torch.Tensor], noise: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    from connito.moe.state import save_state

    save_state({name: tensor + noise(name, tensor) for name, tensor in state.items()}, work.draft)


def _noise(like: torch.Tensor, norm: float, work: Work, name: str) -> torch.Tensor:
    """Gaussian noise of an exact Frobenius norm, the same whenever the same miner makes it."""
    import hashlib

    import torch

    seed = hashlib.sha256(f"{work.run}/{work.cycle}/{work.miner}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
    drawn = torch.randn(like.shape, generator=generator)
    return (drawn * (norm / float(drawn.norm()))).to(like.dtype)

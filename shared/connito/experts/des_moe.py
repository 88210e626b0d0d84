"""One model for several domains at once: DES-MoE (Li et al. 2025, "Dynamic Expert Specialization").

Three parts. An *adaptive router* of two layers, R(h) = W₂·GELU(W₁h + b₁) + b₂ with W₁ [4H, H], stands in the place of each linear
one and is held to it by λ(t)·KL(linear ‖ adaptive). A *map* of experts by domain, A ← 0.9·A + 0.1·share, follows each batch's
routing, and a domain's experts are those with A ≥ 0.6 of its best. Three *phases*: at first everything learns; then routers,
and of the experts those of the batch's domain; at last the map is fixed, routers are frozen, and those experts learn alone.

The paper copies the linear router's weights into W₂ so that nothing changes at the start. That is exact here, since
GELU(x) − GELU(−x) = x: two of the four blocks of W₁ are the identity and its negative, and the others, drawn as usual, begin
unheard.
λ falls linearly to nothing at the end of the second phase, which is our reading of its schedule.

Shapes: T tokens, H hidden size, N experts, k chosen per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from connito.errors import Invalid
from connito.moe.adamw import AdamW
from connito.moe.head import Head
from connito.moe.layout import require_moe_layers
from connito.moe.personal import distance
from connito.moe.router import Call, choice, linear_map, scores_of

if TYPE_CHECKING:
    from connito.moe.layout import MoELayer

BATCH = 4
DECAY, THRESHOLD = 0.9, 0.6
WARM_UP, STABLE, CONSOLIDATED = 1, 2, 3


class AdaptiveRouter(nn.Module):
    """Scores [T, N] of tokens [T, H] by two layers, which begin as one linear map with `weight` [N, H] and `bias` [N]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, generator: torch.Generator) -> None:
        super().__init__()
        size = weight.shape[1]
        one, rest = torch.eye(size), torch.empty(2 * size, size)
        nn.init.kaiming_uniform_(rest, nonlinearity="relu", generator=generator)
        start = weight.detach().float().cpu()
        quiet = torch.zeros(len(start), 2 * size)
        first, second = torch.cat([one, -one, rest]), torch.cat([start, -start, quiet], dim=1)
        device = weight.device
        self.first, self.shift = nn.Parameter(first.to(device)), nn.Parameter(torch.zeros(4 * size, device=device))
        self.second = nn.Parameter(second.to(device))
        self.last = nn.Parameter(
            torch.zeros(len(start), device=device) if bias is None else bias.detach().float().clone()
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        return F.linear(F.gelu(F.linear(tokens, self.first, self.shift)), self.second, self.last)


@dataclass(frozen=True)
class Phases:
    """Ends of the first phase and of the second, as shares of all steps; `weight` is λ at the start."""

    warm_up: float = 0.2
    stable: float = 0.6
    weight: float = 0.1

    def at(self, step: int, steps: int) -> tuple[int, float]:
        """Return the phase of a step, and λ."""
        done = step / steps
        if done < self.stable:
            return (WARM_UP if done < self.warm_up else STABLE), self.weight * (1 - done / self.stable)
        return CONSOLIDATED, 0.0


@dataclass
class DomainMap:
    """Affinity of domains to experts, [N] by domain and layer: a running mean of shares of its slots."""

    affinity: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)

    def see(self, domain: str, layer: int, ids: torch.Tensor, experts: int) -> None:
        """Take in what a batch of a domain chose: ids [T, k]."""
        share = torch.bincount(ids.flatten().cpu(), minlength=experts)[:experts].double() / ids.numel()
        before = self.affinity.setdefault(domain, {}).get(layer, torch.zeros(experts, dtype=torch.float64))
        self.affinity[domain][layer] = DECAY * before + (1 - DECAY) * share

    def own(self, domain: str, layer: int) -> torch.Tensor:
        """Return which experts are a domain's, bool [N]."""
        values = self.affinity[domain][layer]
        return values >= THRESHOLD * values.max()


@dataclass(frozen=True)
class Adapted:
    """Result beside the trained experts in the model: routers by layer, the map, and the losses of the batches."""

    routers: Mapping[int, AdaptiveRouter]
    domains: DomainMap
    losses: list[float]


Heard = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


@contextmanager
def routed_by(model: nn.Module, routers: Mapping[int, AdaptiveRouter], heard: Heard | None = None) -> Iterator[None]:
    """Let adaptive routers choose inside the block. heard: told layer, linear and adaptive scores [T, N], and choice [T, k]."""
    with ExitStack() as stack:
        for index, layer in require_moe_layers(model).items():
            hook = _hook(index, routers[index], heard)
            stack.callback(layer.router.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _hook(index: int, adaptive: AdaptiveRouter, heard: Heard | None) -> Callable[..., Any]:
    def hook(router: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        tokens = args[0].reshape(-1, args[0].shape[-1]).float()
        linear, moved = scores_of(router, tokens), adaptive(tokens)
        again = Call(router, args, output, kwargs).scored(moved)
        if heard is not None:
            heard(index, linear, moved, choice(again)[2].reshape(len(moved), -1))
        return again

    return hook


def adapt(
    model: nn.Module,
    texts: Mapping[str, torch.Tensor],
    steps: int,
    *,
    phases: Phases | None = None,
    rate: float = 3e-3,
    seed: int = 0,
) -> Adapted:
    """Train experts in place and routers beside them on texts, ids [n, L + 1] by domain; a batch is of one domain.

    Shared parameters and the shipped routers stay as they are. Raises `Invalid` for experts of whole numbers.
    """
    phases, layers = phases or Phases(), require_moe_layers(model)
    banks = {f"{i}.{name}": getattr(layer.experts, name) for i, layer in layers.items() for name in layer.parameters}
    if not all(bank.is_floating_point() for bank in banks.values()):
        raise Invalid("experts of whole numbers cannot be trained: load the model in F32 or BF16")
    generator = torch.Generator().manual_seed(seed)
    routers = {i: AdaptiveRouter(*linear_map(layer.router), generator) for i, layer in layers.items()}
    work = _Work(model, layers, banks, routers, DomainMap(), phases)
    names = sorted(texts)
    try:
        for bank in banks.values():
            bank.requires_grad_(True)
        for step in range(steps):
            domain = names[int(torch.randint(len(names), (), generator=generator))]
            rows = torch.randint(len(texts[domain]), (BATCH,), generator=generator)
            work.step(domain, texts[domain][rows].long(), step, steps, rate)
    finally:
        for bank in banks.values():
            bank.requires_grad_(False)
    return Adapted(routers, work.domains, work.losses)


class _Work:
    """The objects that a step uses."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[int, MoELayer],
        banks: Mapping[str, torch.Tensor],
        routers: Mapping[int, AdaptiveRouter],
        domains: DomainMap,
        phases: Phases,
    ) -> None:
        self.model, self.layers, self.banks, self.routers = model, layers, banks, routers
        self.domains, self.phases, self.losses = domains, phases, list[float]()
        self._head, self._experts = Head(model), AdamW(banks, betas=(0.9, 0.95))
        moving = {f"{i}.{name}": p for i, router in routers.items() for name, p in router.named_parameters()}
        self._routers = AdamW(moving, betas=(0.9, 0.95))

    def step(self, domain: str, ids: torch.Tensor, step: int, steps: int, rate: float) -> None:
        """Apply one step on a batch [B, L + 1] of a domain."""
        phase, weight = self.phases.at(step, steps)
        divergences: dict[int, torch.Tensor] = {}

        def hear(index: int, linear: torch.Tensor, moved: torch.Tensor, chosen: torch.Tensor) -> None:
            divergences[index] = distance(linear, moved)
            if phase != CONSOLIDATED:
                self.domains.see(domain, index, chosen, self.layers[index].num_experts)

        with routed_by(self.model, self.routers, hear):
            loss = self._head.nll(ids[:, :-1], ids[:, 1:]).mean()
            (loss + weight * torch.stack([*divergences.values()]).mean()).backward()  # type: ignore[no-untyped-call]
        self.losses.append(float(loss.detach()))
        others = {} if phase == WARM_UP else {i: ~self.domains.own(domain, i) for i in self.layers}
        self._move(others, rate)
        if phase == CONSOLIDATED:
            for router in self.routers.values():
                router.zero_grad(set_to_none=True)
        else:
            self._routers.step(rate / 10)

    def _move(self, others: Mapping[int, torch.Tensor], rate: float) -> None:
        """Step the experts; rows of `others` by layer, bool [N], stay to the bit, whatever their moments say."""
        kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, bank in self.banks.items():
            index = int(name.partition(".")[0])
            if bank.grad is not None and index in others:
                rows = others[index].to(bank.device)
                bank.grad[rows] = 0
                kept[name] = rows, bank.detach()[rows].clone()
        self._experts.step(rate)
        for name, (rows, before) in kept.items():
            self.banks[name].data[rows] = before


def fold(model: nn.Module, adapted: Adapted, ids: torch.Tensor) -> nn.Module:
    """Return a copy of the model with the linear routers whose scores on `ids` [n, L] are nearest to the adaptive ones.

    It is what transformers loads: a router of two layers is not.
    """
    seen: dict[int, list[torch.Tensor]] = {}
    small = copy.deepcopy(model)
    with ExitStack() as stack, torch.no_grad():
        for index, layer in require_moe_layers(model).items():
            keep = seen.setdefault(index, []).append
            stack.callback(layer.router.register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0])).remove)
        with routed_by(model, adapted.routers):
            model(input_ids=ids.long(), use_cache=False)
        for index, layer in require_moe_layers(small).items():
            tokens = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen[index]]).float()
            wanted, (weight, bias) = adapted.routers[index](tokens), linear_map(layer.router)
            found = torch.linalg.lstsq(tokens.double(), (wanted if bias is None else wanted - bias).double())
            weight.copy_(found.solution.T.to(weight))
    return small

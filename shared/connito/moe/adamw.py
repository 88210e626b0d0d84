"""AdamW (Loshchilov & Hutter, 2019) over a miner's target rows, with as little beside them as it takes.

Steps are far smaller than bfloat16 resolves. A row that is stored in it is therefore one half of a float32 number whose other
16 bits lie here: the pair is what AdamW moves, to the bit as it moves a float32 tensor, and costs two bytes a value where a
second copy costs four. With moments of one byte each, gradients of two and these two, a trained value takes 6.03 bytes
beside its own two. Everything is computed in float32, a chunk at a time, and every gradient is let go of once it is used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from connito.moe.moments import BLOCK, Moment, Moments

EPSILON = 1e-8
# Values updated at a time: small enough for a processor's cache, large enough that starting kernels costs nothing on a GPU.
CHUNK = {"cpu": 1 << 17, "cuda": 1 << 22}


class AdamW:
    """The optimiser of named tensors. `compact` takes one byte for each moment's value; otherwise steps are torch's own.

    A tensor without a gradient is left as it is, moments included.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        *,
        compact: bool = False,
        start: Moments | None = None,
    ) -> None:
        """Begin with the moments of `start` where they belong to these tensors."""
        self.parameters = dict(parameters)
        self._betas, self._decay, self._compact = betas, weight_decay, compact
        self._low = {name: _low(parameter) for name, parameter in parameters.items()}
        self._first: dict[str, Moment] = {}
        self._second: dict[str, Moment] = {}
        # Steps that each moment has seen.
        self._age: dict[str, tuple[int, int]] = {}
        if start is not None and start.fit(parameters):
            self._begin(start)

    def norm(self) -> torch.Tensor:
        """Return the Euclidean norm of all gradients, float32 [], on the first tensor's device."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        device = next(iter(self.parameters.values())).device
        # float64 is not narrowed on the way.
        single = [g.float() if g.dtype == torch.float64 else g for g in gradients]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32).to(device) for g in single]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, rate: float, scale: torch.Tensor | None = None) -> None:
        """Apply one step with gradients times `scale` ([], for clipping), and let go of the gradients."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            self._update(name, parameter, rate, None if scale is None else scale.to(parameter.device))
            parameter.grad = None

    def moments(self, *, second_only: bool = False) -> Moments:
        """Return the moments as they are now."""
        shapes = {name: self.parameters[name].shape for name in self._second}
        steps = max((age for _, age in self._age.values()), default=0)
        return Moments(steps, self._first, self._second, shapes, second_only)

    def bytes(self) -> int:
        """Return the bytes that are kept beside the parameters from one step to the next."""
        low = sum(part.numel() * part.element_size() for part in self._low.values() if part is not None)
        return low + sum(moment.bytes() for moment in (*self._first.values(), *self._second.values()))

    def _update(self, name: str, parameter: torch.Tensor, rate: float, factor: torch.Tensor | None) -> None:
        """Move one tensor that has a gradient, times `factor` ([]) where there is one."""
        if name not in self._age:
            self._first[name] = Moment.zeros(parameter, compact=self._compact, signed=True)
            self._second[name] = Moment.zeros(parameter, compact=self._compact, signed=False)
        young, old = self._age.get(name, (0, 0))
        ages = self._age[name] = (young + 1, old + 1)
        assert parameter.grad is not None
        gradient = parameter.grad.reshape(-1)
        for begin, end in _chunks(parameter):
            part = gradient[begin:end].float()
            self._move(name, begin, end, part if factor is None else part * factor, rate, ages)

    def _begin(self, start: Moments) -> None:
        for name in start.shapes:
            parameter = self.parameters[name]
            kept = None if start.second_only else start.first.get(name)
            self._age[name] = (0 if kept is None else start.steps, start.steps)
            self._first[name] = self._taken(kept, parameter, signed=True)
            self._second[name] = self._taken(start.second[name], parameter, signed=False)

    def _taken(self, kept: Moment | None, parameter: torch.Tensor, *, signed: bool) -> Moment:
        made = Moment.zeros(parameter, compact=self._compact, signed=signed)
        if kept is not None:
            made.write(0, kept.read(0, parameter.numel()).to(parameter.device))
        return made

    def _move(
        self, name: str, begin: int, end: int, gradient: torch.Tensor, rate: float, ages: tuple[int, int]
    ) -> None:
        """Apply the step to values [begin, end), in the order of torch's own AdamW."""
        (beta1, beta2), (young, old) = self._betas, ages
        first, second = self._first[name], self._second[name]
        m = first.read(begin, end).lerp_(gradient, 1 - beta1)
        v = second.read(begin, end).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        values = self._value(name, begin, end)
        values.mul_(1 - rate * self._decay)
        deviation = v.sqrt().div_((1 - beta2**old) ** 0.5).add_(EPSILON)
        values.addcdiv_(m, deviation, value=-rate / (1 - beta1**young))
        if self._compact:
            first.write(begin, m)
            second.write(begin, v)
        self._put(name, begin, end, values)

    def _value(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return values in float32: the parameter's own memory, or a float32 number from both halves."""
        parameter, low = self.parameters[name].detach().view(-1), self._low[name]
        if low is None:
            return parameter[begin:end]
        if low.dtype == torch.float32:
            return low[begin:end]
        high = parameter[begin:end].view(torch.int16).int() << 16
        return (high + low[begin:end]).view(torch.float32)

    def _put(self, name: str, begin: int, end: int, values: torch.Tensor) -> None:
        parameter, low = self.parameters[name].detach().view(-1), self._low[name]
        if low is None:
            return
        if low.dtype == torch.float32:
            parameter[begin:end] = values
            return
        bits = values.view(torch.int32)
        high = (bits + 0x8000) >> 16
        parameter[begin:end].view(torch.int16).copy_(high)
        low[begin:end] = bits - (high << 16)


def _chunks(parameter: torch.Tensor) -> list[tuple[int, int]]:
    size, total = CHUNK.get(parameter.device.type, CHUNK["cpu"]), parameter.numel()
    return [(begin, min(begin + size, total)) for begin in range(0, total, size)]


def _low(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return what completes a parameter to float32: nothing, the lower halves, or a whole copy."""
    if parameter.dtype == torch.float32:
        return None
    if parameter.dtype == torch.bfloat16:
        return torch.zeros(parameter.numel(), dtype=torch.int16, device=parameter.device)
    return parameter.detach().float().view(-1).clone()


assert all(size % BLOCK == 0 for size in CHUNK.values())

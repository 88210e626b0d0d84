"""A second device to test with where there is none: tensors of the CPU that say they are elsewhere, and keep to themselves.

Inside `second_device()` there is a device `cuda`: whatever is made on it or moved to it is marked, results of marked tensors
are marked, and an operation on tensors of both raises, as it would on a real one. Nothing about speed or rounding is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

THERE = torch.device("cuda", 0)
HERE = torch.device("cpu")
_GET_DEVICE = torch.Tensor.device.__get__
_MOVES = (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.type_as)
# These read an index, or a number, from wherever it is; or write from another device.
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_MIXES = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.copy_, _SET_DATA)
_PLAIN = (torch.device, torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type)
_LEAVES = (torch.Tensor.numpy, torch.Tensor.__array__)


class SecondDevice(TorchFunctionMode):
    """Marks tensors of the second device, and counts what was computed on it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        # Addresses of what is there: views and parameters share them.
        self._addresses: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = dict(kwargs or {})
        if func == _GET_DEVICE:
            return THERE if self._marked(args[0]) else func(*args)
        if func in _PLAIN:
            return func(*args, **known)
        if func in _LEAVES and self._marked(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if (
            func == torch.Tensor.__getitem__
            and not self._marked(args[0])
            and any(map(self._marked, _tensors(args[1:])))
        ):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = list(_tensors(args[:1] if func == torch.Tensor.__deepcopy__ else (args, known)))
        places = {self._marked(tensor) for tensor in tensors if tensor.numel() > 1}
        if len(places) > 1 and func not in (*_MIXES, torch.Tensor.to, torch.Tensor.type_as):
            raise RuntimeError(f"{getattr(func, '__name__', func)}: tensors on cuda:0 and on the cpu")
        there = self._place(func, args, known, default=any(map(self._marked, tensors)))
        self.calls += there and bool(tensors)
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        out = func(*_here(args), **_here(known))
        if func in _MOVES and there != self._marked(args[0]) and out is args[0]:
            out = args[0].clone()
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in given:
                self._mark(tensor, there)
        return out

    def _marked(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._addresses

    def _mark(self, tensor: torch.Tensor, there: bool) -> None:
        change = self._addresses.add if there else self._addresses.discard
        if address := tensor.untyped_storage().data_ptr():  # none, where nothing is stored
            change(address)

    def _place(self, func: Callable[..., Any], args: tuple[Any, ...], known: dict[str, Any], *, default: bool) -> bool:
        """Return whether the result is on the second device."""
        if func is torch.Tensor.cpu:
            return False
        if func is torch.Tensor.__getitem__:
            return self._marked(args[0])
        named = known.get("device")
        if func is torch.Tensor.to:
            named = next((a for a in (*args[1:], named) if isinstance(a, (torch.device, str))), None)
            like = next((a for a in args[1:] if isinstance(a, torch.Tensor)), None)
            default = self._marked(args[0] if like is None else like)
        return default if named is None else torch.device(named).type == "cuda"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _here(value: Any) -> Any:
    """The same arguments with the device that really exists."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return HERE if torch.device(value).type == "cuda" else value
    if type(value) in (tuple, list):
        return type(value)(map(_here, value))
    if type(value) is dict:
        return {name: _here(part) for name, part in value.items()}
    return value


@contextmanager
def second_device(patch: pytest.MonkeyPatch, capability: tuple[int, int] = (7, 0)) -> Iterator[SecondDevice]:
    """Make a device `cuda` inside the block, the first that a model would take; from 8.0 on it has grouped products."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    patch.delenv("CONNITO_DEVICE", raising=False)
    # No mode is active inside `backward`, so what is computed again there says it is on the CPU: only that is not compared.
    checks = checkpoint._allowed_determinism_checks_to_fns
    patch.setitem(checks, "default", lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype})
    mode = SecondDevice()
    with mode:
        yield mode
    patch.undo()

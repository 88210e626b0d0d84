"""θ, the rows of the target experts, as an artifact: named tensors in a safetensors file with reproducible bytes.

Names are `layers.<l>.<parameter>`, rows are in ascending expert id. The writer is our own because the library keeps
metadata in a hash map, whose order differs from process to process, and a state's digest is its identity here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.data.safetensors_header import header_bytes
from connito.errors import Invalid, NotFound
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch

TargetState = dict[str, "torch.Tensor"]


def tensor_name(layer: int, parameter: str) -> str:
    """Return `layers.<l>.<parameter>`."""
    return f"layers.{layer}.{parameter}"


def split_name(name: str) -> tuple[int, str]:
    """Return (layer, parameter) of a state's tensor name. Raises `Invalid` for anything else."""
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdigit():
        raise Invalid(
            f"{name!r} is not a target tensor: expected layers.<l>.<parameter>", reason=reasons_pb2.REASON_WRONG_TENSORS
        )
    return int(parts[1]), parts[2]


def save_state(state: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write `state` to `path`; the same state and metadata always give the same bytes."""
    write_safetensors(path, state, metadata or {})


def load_state(path: Path) -> TargetState:
    """Read a state, names sorted. Raises `NotFound` or `Invalid` (BAD_HEADER) for a file that is not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise NotFound(f"there is no state at {path}", reason=reasons_pb2.REASON_ARTIFACT_MISSING)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise Invalid(f"{path} is not a safetensors file: {error}", reason=reasons_pb2.REASON_BAD_HEADER) from error
    for name in tensors:
        split_name(name)
    return {name: tensors[name] for name in sorted(tensors)}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write tensors one by one in the safetensors layout, widest dtype first, then by name; keys sorted."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _dtype_name(tensors[name]),
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    partial = path.with_name(path.name + ".partial")
    written = 0
    with partial.open("wb") as file:
        file.write(header_bytes(header))
        for name in order:
            data = raw_bytes(tensors[name])
            file.write(data)
            written += data.nbytes
            if progress is not None and offset:
                progress(written / offset)
    partial.replace(path)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's values as little-endian bytes in row order, without a copy where it is contiguous on the
    CPU.
    """
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # A tensor of one value is contiguous whatever its stride.
    flat = flat if flat.stride(-1) == 1 else flat.clone(memory_format=torch.contiguous_format)
    if not flat.numel():
        return memoryview(b"")
    values: Any = flat.view(torch.uint8).numpy()
    return memoryview(values)


def _dtype_name(tensor: torch.Tensor) -> str:
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    if tensor.dtype not in names:
        raise Invalid(
            f"tensors of {tensor.dtype} are not stored here; convert them first", reason=reasons_pb2.REASON_WRONG_DTYPE
        )
    return names[tensor.dtype]

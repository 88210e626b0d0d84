"""Tell from its tensors how a checkpoint is quantised: what the configuration says may be a leftover.

FP8 in blocks and MXFP4 are read as they are published (`connito.base.dequantise`): a weight and its scales stand as one tensor of
numbers, and nothing behind knows of them. Another kind is refused by its name, with what to do instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from connito.base.dequantise import MXFP4_BLOCK, Packed, check_shapes
from connito.data.checkpoint_files import Header
from connito.errors import Invalid
from connito.v1 import reasons_pb2

FP8, MXFP4 = "FP8 in blocks", "MXFP4"
_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
_SCALES = "_scale_inv"
# What the names of a quantised tensor end in, and whose they are. The first that fits a checkpoint is named.
_ENDINGS = (
    ((".weight_packed", ".weight_shape", ".weight_global_scale", ".input_global_scale"), "compressed-tensors"),
    ((".qweight", ".qzeros", ".g_idx"), "GPTQ or AWQ"),
    ((".absmax", ".quant_map", ".nested_absmax", ".quant_state.bitsandbytes__nf4", ".SCB"), "bitsandbytes"),
    (("_blocks",), MXFP4),
    ((_SCALES,), FP8),
    ((".weight_scale", ".input_scale"), "FP8 or INT8"),
    ((":qdata", "_qdata", "._weight_qdata"), "torchao"),
)


@dataclass(frozen=True)
class Quantised:
    """A checkpoint's tensors with packed weights as one each. `headers`: as numbers, in float32 until the model says otherwise;
    `packed`: by weight; `kind`: what a person calls it, empty for plain numbers."""

    headers: Mapping[str, Header]
    packed: Mapping[str, Packed] = field(default_factory=dict)
    kind: str = ""


def unpacked_headers(config: Any, headers: Mapping[str, Header]) -> Quantised:
    """Return the tensors as numbers, and take a configuration's flag away: what comes out is not quantised.

    Raises `Invalid` for a quantisation that is not read here, and for a weight without its scales.
    """
    kind, settings = quantisation(headers), _settings(config)
    if kind is None:
        return Quantised(headers)
    if kind not in (FP8, MXFP4):
        raise Invalid(
            f"the checkpoint is quantised ({kind}): experts are trained as F32, BF16 or F16 rows; use the checkpoint that was "
            "not quantised, or dequantise it with the tool that made it",
            reason=reasons_pb2.REASON_WRONG_DTYPE,
        )
    packed = _mxfp4(headers) if kind == MXFP4 else _fp8(headers, settings)
    parts = {part for weight in packed.values() for part in (weight.values, weight.scales)}
    plain = {name: header for name, header in headers.items() if name not in parts}
    whole = {name: _as_numbers(headers[weight.values], weight) for name, weight in packed.items()}
    if odd := next((n for n, h in plain.items() if h.dtype in _FP8 or n.endswith(("_blocks", "_scales"))), None):
        raise _halves(odd, kind)
    block = next((weight.block for weight in packed.values()), None)
    return Quantised({**plain, **whole}, packed, kind if block is None else f"{kind} of {block[0]} × {block[1]}")


def _settings(config: Any) -> Mapping[str, Any]:
    """Return what a configuration says of its quantisation, which it says no longer."""
    found: Mapping[str, Any] = {}
    for part in (config.get_text_config(), config):
        given = getattr(part, "quantization_config", None)
        if given is not None:
            found = given if isinstance(given, dict) else given.to_dict()
            del part.quantization_config
    return found


def _fp8(headers: Mapping[str, Header], settings: Mapping[str, Any]) -> dict[str, Packed]:
    block = settings.get("weight_block_size", [128, 128])
    if block is not None and not (
        isinstance(block, list | tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise Invalid(
            f"weight_block_size in config.json is {str(block)[:40]}, where two sizes are expected; fetch it again",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    out = {}
    for scales in (name for name in headers if name.endswith(_SCALES)):
        name = scales.removesuffix(_SCALES)
        if name not in headers or headers[name].dtype not in _FP8[:2]:
            raise _halves(name, FP8)
        shape = headers[name].shape
        out[name] = Packed(name, scales, shape, block=None if block is None else (block[0], block[1]))
        check_shapes(name, shape, headers[scales].shape, out[name])
    return out


def _mxfp4(headers: Mapping[str, Header]) -> dict[str, Packed]:
    out = {}
    for blocks in (name for name in headers if name.endswith("_blocks")):
        name = blocks.removesuffix("_blocks")
        scales, shape = f"{name}_scales", headers[blocks].shape
        if scales not in headers or {headers[blocks].dtype, headers[scales].dtype} != {"U8"}:
            raise _halves(name, MXFP4)
        packed = Packed(blocks, scales, (), four_bit=True)
        check_shapes(name, shape, headers[scales].shape, packed)
        out[name] = Packed(blocks, scales, (shape[0], MXFP4_BLOCK * shape[2], shape[1]), four_bit=True)
    return out


def _as_numbers(values: Header, weight: Packed) -> Header:
    return Header(values.file, "F32", weight.shape, values.start, 4 * math.prod(weight.shape))


def _halves(name: str, kind: str) -> Invalid:
    return Invalid(
        f"{name} is quantised ({kind}), and its values or its scales are missing or of another type: a file of the checkpoint is "
        "incomplete; fetch it again",
        reason=reasons_pb2.REASON_WRONG_TENSORS,
    )


def quantisation(headers: Mapping[str, Header]) -> str | None:
    """Return what quantised the tensors with these headers, or None where they hold plain numbers."""
    for endings, kind in _ENDINGS:
        if any(name.endswith(endings) for name in headers):
            return kind
    odd = next((h.dtype for n, h in headers.items() if n.endswith("weight") and h.dtype in _FP8), None)
    if odd:
        return f"{odd} without scales"
    small = next((h.dtype for n, h in headers.items() if n.endswith(".weight") and h.dtype in ("I8", "U8", "F4")), None)
    return small and f"{small} weights"

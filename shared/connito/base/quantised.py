"""Tell from its tensors how a checkpoint is quantised: what the configuration says may be a leftover.

A tensor's `Storage` says how its values are kept. What is plain needs no entry. A kind that is not read here is refused by its
name, with what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from connito.data.checkpoint_files import Header
from connito.errors import Invalid
from connito.v1 import reasons_pb2


class Storage(StrEnum):
    """Ways of storing a tensor's values."""

    PLAIN = "plain"
    FP8_BLOCK = "fp8-block"
    MXFP4 = "mxfp4"


_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
# What the names of a quantised tensor end in, and whose they are. The first that fits a checkpoint is named.
_ENDINGS = (
    ((".weight_packed", ".weight_shape", ".weight_global_scale", ".input_global_scale"), "compressed-tensors"),
    ((".qweight", ".qzeros", ".g_idx"), "GPTQ or AWQ"),
    ((".absmax", ".quant_map", ".nested_absmax", ".quant_state.bitsandbytes__nf4", ".SCB"), "bitsandbytes"),
    (("_blocks",), "MXFP4"),
    ((".weight_scale_inv",), "FP8 in blocks"),
    ((".weight_scale", ".input_scale"), "FP8 or INT8"),
    ((":qdata", "_qdata", "._weight_qdata"), "torchao"),
)


def storage_of(config: Any, headers: Mapping[str, Header]) -> dict[str, Storage]:
    """Return how tensors are stored that are not plain, and take a configuration's flag away that its tensors belie.

    Raises `Invalid` for a quantisation that is not read here.
    """
    kind = quantisation(headers)
    if kind is None:
        for part in (config, config.get_text_config()):
            if getattr(part, "quantization_config", None) is not None:
                del part.quantization_config
        return {}
    raise Invalid(
        f"the checkpoint is quantised ({kind}): experts are trained as F32, BF16 or F16 rows; use the checkpoint that was not "
        "quantised, or dequantise it with the tool that made it",
        reason=reasons_pb2.REASON_WRONG_DTYPE,
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

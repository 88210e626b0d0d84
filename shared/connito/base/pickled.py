"""Weights in PyTorch's own format (`pytorch_model.bin`), which `connito base import --rewrite` turns into safetensors.

They are read with `weights_only`: what such a file may hold beside tensors could be code, and is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from typing import TYPE_CHECKING

from connito.base.stored import format_name
from connito.data.checkpoint_files import CheckpointFiles, Header
from connito.errors import Invalid
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch


def pickled_tensors(files: CheckpointFiles) -> dict[str, torch.Tensor]:
    """Return every tensor by name, memory-mapped where it can be. Raises `Invalid` for a damaged file, or one with more in it."""
    import torch

    found: dict[str, torch.Tensor] = {}
    for file in files.weights:
        try:
            # What is no archive was saved by an old program, and is read whole.
            mapped = zipfile.is_zipfile(files.paths[file])
            state = torch.load(files.paths[file], map_location="cpu", weights_only=True, mmap=mapped)
        except (RuntimeError, pickle.UnpicklingError, ValueError, EOFError, OSError) as error:
            why = next(iter(str(error).splitlines()), "it ends too early")
            raise _invalid(f"{file} in {files.where} cannot be read: {why}; fetch it again") from error
        if not isinstance(state, dict) or not all(_plain(value) for value in state.values()):
            raise _invalid(
                f"{file} in {files.where} does not hold tensors by name; save the model with `save_pretrained`"
            )
        if twice := sorted(set(found) & set(state)):
            raise _invalid(
                f"{twice[0]} is in two files of {files.where}; fetch the checkpoint again into an empty folder"
            )
        found |= state
    return found


def pickled_headers(files: CheckpointFiles) -> dict[str, Header]:
    """Return every tensor as headers of safetensors describe them; bytes of one have no place here."""
    return {
        name: Header("", format_name(tensor.dtype), tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in pickled_tensors(files).items()
    }


def _plain(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _invalid(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_BAD_HEADER)

"""A coded outer step between two states, as a merge writes it."""

from __future__ import annotations

from pathlib import Path

from connito.data.codecs.file import Codec, head
from connito.data.pseudo_gradients import load_float32
from connito.data.tensors import TensorWriter, read_header, read_tensors
from connito.protocol.coding import code_step


def write_coded_step(how: Codec, parent: Path, stepped: Path, out: Path, coded: Path) -> None:
    """Write the coded step between two states to `coded`, and the state that it decodes to, to `out`."""
    header, exact = read_header(parent), read_tensors(stepped)[0]
    layout = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
    with TensorWriter(out, layout, header.metadata) as writer, coded.open("wb") as file:
        file.write(head(how))
        for name in writer.names:
            code, rows = code_step(how, name, load_float32(parent, name), exact[name], layout[name][0])
            file.write(code)
            writer.write(name, rows)

"""Rows of Parquet, Arrow, Feather and ORC files, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from connito.data.reading.decode import binary
from connito.data.reading.rows import Account, Row, unreadable

# Rows at once, fewer where they are large, such as pictures.
_BATCH, _BATCH_BYTES = 256, 1 << 24
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"FEA1": "feather", b"ORC": "orc"}


def arrow_rows(file: BinaryIO, kind: str, name: str, account: Account) -> Iterator[Row]:
    """Yield the rows of a seekable file (`arrow stream` need not be). Raises `Invalid` when it is damaged."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise unreadable(f"{name} is {kind}, which takes pyarrow to read: pip install 'connito[data]'") from error
    number = 0
    try:
        for batch in _batches(file, kind):
            columns = [_column(batch.column(place), account) for place in range(batch.num_columns)]
            for cells in zip(*columns, strict=True):
                number += 1
                yield Row(dict(zip(batch.schema.names, cells, strict=True)), f"{name}#{number}")
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise unreadable(
            f"{name} is {kind} that cannot be read after row {number}: {first}; get the file again"
        ) from error


def _batches(file: BinaryIO, kind: str) -> Iterator[Any]:
    import pyarrow as pa

    if kind == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(file, pre_buffer=False) as opened:
            described = opened.metadata
            size = sum(described.row_group(place).total_byte_size for place in range(described.num_row_groups))
            rows = _BATCH_BYTES * described.num_rows // max(1, size)
            yield from opened.iter_batches(max(1, min(_BATCH, rows)), use_threads=False)
    elif kind == "feather":
        import pyarrow.feather as feather

        yield from feather.read_table(file, memory_map=False).to_batches(_BATCH)
    elif kind == "orc":
        import pyarrow.orc as orc

        opened = orc.ORCFile(file)
        for stripe in range(opened.nstripes):
            yield from _pieces(opened.read_stripe(stripe))
    elif kind == "arrow":
        reader = pa.ipc.open_file(file)
        for place in range(reader.num_record_batches):
            yield from _pieces(reader.get_batch(place))
    else:
        for batch in pa.ipc.open_stream(file):
            yield from _pieces(batch)


def _pieces(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _BATCH):
        yield batch.slice(start, _BATCH)


def _column(column: Any, account: Account) -> list[Any]:
    """Return a column as Python values: bytes that are text as text, others as nothing."""
    import pyarrow as pa

    try:
        values: list[Any] = column.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        return [_text(value, account) for value in column.cast(pa.binary()).to_pylist()]
    except (ValueError, OverflowError, TypeError, ImportError):
        return list(column.cast(pa.string()).to_pylist())  # Times finer than Python's.
    return [_text(value, account) for value in values] if _has_bytes(column.type) else values


def _has_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    ):
        return True
    return any(_has_bytes(kind.field(place).type) for place in range(kind.num_fields))


def _text(value: Any, account: Account) -> Any:
    if isinstance(value, bytes):
        if not binary(value[:4096]):
            text = value.decode("utf-8", "replace")
            account.dropped["broken characters replaced"] += text.count("\ufffd")
            return text
        account.dropped["binary values"] += 1
        return None
    if isinstance(value, list):
        return [_text(inner, account) for inner in value]
    if isinstance(value, dict):
        return {name: _text(inner, account) for name, inner in value.items()}
    return value

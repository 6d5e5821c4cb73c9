"""Parquet files of the history tables, written completely or not at all. Needs the extra `parquet`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from consumers.errors import ExportRefused
from producers.errors import FileNotWritten

_AMOUNT, _INSTANT = pa.decimal128(20, 8), pa.timestamp("us", "UTC")
_TYPES = {
    "id": pa.int64(),
    "event_id": pa.string(),
    "source": pa.string(),
    "sequence": pa.int64(),
    "portfolio_id": pa.int64(),
    "snapshot_date": pa.date32(),
    "timestamp": _INSTANT,
    **dict.fromkeys(("balance", "total_invested", "total_profit_loss", "total_value"), _AMOUNT),
    "open_positions": pa.int32(),
    "trade_count": pa.int32(),
    "archived_at": _INSTANT,
    "archive_month": pa.string(),
    "signals_count": pa.int32(),
    "signals_data": pa.string(),  # JSON
    "created_at": _INSTANT,
}
# Rows are Python objects only until they fill a batch, because a batch needs less memory. A row group is written at the
# first of its two limits.
_BATCH_ROWS, _BATCH_CHARACTERS = 1_000, 4 * 1024 * 1024
_GROUP_ROWS, _GROUP_BYTES = 100_000, 32 * 1024 * 1024
_STAGING = ".parquet-"


def write_parquet(file: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    """Write the rows of `stream_portfolio_history` or `stream_signal_archives` to `file`. Return their number.

    `file` is replaced when the new one is complete; until then it is not changed, whatever happens. Amounts are
    decimals with 8 places, times are in UTC, signals are a string with JSON.

    Raises:
        ExportRefused: `file` exists and is not a regular file.
        FileNotWritten: the file cannot be written.
    """
    if file.exists() and not file.is_file():
        raise ExportRefused(f"{file} cannot be replaced: not a regular file")
    target = file.resolve()  # a symbolic link is kept
    try:
        with TemporaryDirectory(prefix=_STAGING, dir=target.parent) as staging:
            new = Path(staging) / "rows.parquet"
            with new.open("xb") as out:
                count = _write(out, columns, rows)
                out.flush()
                os.fsync(out.fileno())
            new.replace(target)
    except OSError as error:
        raise FileNotWritten(file, error) from error
    return count


def _write(out: Any, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    schema = pa.schema([(name, _TYPES[name]) for name in columns])
    count = 0
    with ParquetWriter(out, schema, compression="zstd") as writer:
        group: list[pa.RecordBatch] = []
        for batch in _batches(rows, schema):
            group.append(batch)
            count += batch.num_rows
            if sum(one.num_rows for one in group) >= _GROUP_ROWS or sum(one.nbytes for one in group) >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group, schema))
    return count


def _batches(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    read: list[Sequence[Any]] = []
    characters = 0
    for row in rows:
        read.append(row)
        characters += sum(len(value) for value in row if isinstance(value, str))
        if len(read) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield _batch(read, schema)
            read, characters = [], 0
    if read:
        yield _batch(read, schema)


def _batch(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [
        pa.array([str(value) if isinstance(value, UUID) else value for value in values], field.type)
        for field, values in zip(schema, zip(*rows, strict=True), strict=True)
    ]
    return pa.record_batch(arrays, schema=schema)

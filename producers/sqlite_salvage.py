"""Reads the rows of a damaged SQLite file page by page, without an intact B-tree.

The layout of pages, cells and records is https://www.sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from producers.sqlite_wal import PAGE_SIZES, RawFile, WriteAheadLog, wal_page_bytes

_MAX_PAYLOAD_BYTES = 64 * 2**20  # an event in an outbox has at most 8 MiB
_MAX_HEADER_BYTES = 98_307  # SQLite's limit for the header of a record
_PROBED_PAGES = 1000
_TABLE_LEAF = 0x0D
_FIXED_BYTES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)  # size of a value by serial type; 10 and 11 are unused


@dataclass(frozen=True, slots=True)
class Record:
    """Row of a rowid table. Columns that were added to the table after the row was written are missing.

    `values` are in the order of the columns. An INTEGER PRIMARY KEY is None, because it is the rowid. A whole number in
    a REAL column may be an int.
    """

    rowid: int
    values: tuple[int | float | str | bytes | None, ...]


def readable_records(path: Path) -> Iterator[Record]:
    """Yield every readable row of any rowid table in the file at `path` and in its WAL, in no particular order.

    The database must use UTF-8 (SQLite's default). Rows on unreadable pages are left out. SQLite's own tables, such as
    the schema, are read too.

    If the file and its WAL are intact, each row is read once, in its last committed version. Older versions and deleted
    rows may appear in addition: from free pages, and from pages of the file that have a newer image in the WAL, if the
    WAL is damaged or does not prove that it belongs to the file. From a damaged WAL, rows of a transaction that a crash
    rolled back may appear as well. The caller must choose between the versions of a row.

    The caller must also check the content: pages of the file have no checksum, so a value may contain bytes of another
    one, and garbage may happen to look like a row.

    Memory is limited to a few times the longest record (a payload of more than 64 MiB is treated as garbage) and an
    index of the WAL, about 40 MiB for a WAL of 1 GiB. No connection, of this process or another, may use the file
    meanwhile: rows of different times would be mixed, and closing the file releases SQLite's locks in this process.

    Raises:
        OSError: at the first record, if the file does not exist, or if the file or its WAL cannot be opened.
    """
    wal_path = Path(f"{os.path.realpath(path)}-wal")  # SQLite follows links too
    with ExitStack() as stack:
        file = RawFile(path, stack)
        log = RawFile(wal_path if wal_path.exists() else Path(os.devnull), stack)
        page_bytes = _page_bytes(file)
        wal = WriteAheadLog(log, page_bytes or wal_page_bytes(log) or _likely_page_bytes(file))
        page_bytes = page_bytes or wal.page_bytes
        longest = min(_MAX_PAYLOAD_BYTES, file.size + log.size)
        file_pages = -(-file.size // page_bytes)

        file_alone = _Pages(file, log, {}, page_bytes, longest)
        if wal.page_bytes != page_bytes:  # the WAL belongs to another database
            yield from file_alone.records(range(1, file_pages + 1))
            nothing = RawFile(Path(os.devnull), stack)
            images = wal.committed | wal.after_break
            yield from _Pages(nothing, log, images, wal.page_bytes, longest).records(images)
            return

        current = _Pages(file, log, wal.committed, page_bytes, longest)
        beyond = sorted(number for number in wal.committed if number > file_pages)
        yield from current.records(chain(range(1, file_pages + 1), beyond))
        if wal.after_break:
            later = _Pages(file, log, wal.committed | wal.after_break, page_bytes, longest)
            yield from later.records(wal.after_break)
        if not wal.supersedes(file_pages):
            yield from file_alone.records(number for number in wal.committed if number <= file_pages)


class _Pages:
    """Pages of one state of the database: from the WAL if `images` has the offset of a page, else from the file."""

    def __init__(self, file: RawFile, log: RawFile, images: Mapping[int, int], page_bytes: int, longest: int) -> None:
        self._file, self._log, self._images = file, log, images
        self._page_bytes = page_bytes
        self._longest_payload = longest
        self._usable = page_bytes
        first = self._page(1)
        if _is_database_header(first) and page_bytes - first[20] >= 480:
            self._usable = page_bytes - first[20]  # some builds of SQLite reserve bytes at the end of each page

    def records(self, numbers: Iterable[int]) -> Iterator[Record]:
        """Yield the rows on those of the pages that are leaves of a table."""
        for number in numbers:
            page = self._page(number)
            for at in _cell_offsets(page, 100 if number == 1 else 0):
                # A cell may be garbage, or point beyond the end of its page.
                try:
                    record = self._record(page, at)
                except (ValueError, IndexError, struct.error):
                    continue
                yield record

    def _page(self, number: int) -> bytes:
        """Return the page; it is shorter or empty if the file ends before the page does."""
        if number in self._images:
            return self._log.read(self._images[number], self._page_bytes)[: self._usable]
        return self._file.read((number - 1) * self._page_bytes, self._page_bytes)[: self._usable]

    def _record(self, page: bytes, at: int) -> Record:
        size, at = _varint(page, at)
        rowid, at = _varint(page, at)
        if size > self._longest_payload:
            raise ValueError("payload too long")
        local = self._local_bytes(size)
        payload = page[at : at + local]
        if len(payload) < local:
            raise ValueError("payload beyond the end of its page")
        # Check the header before an overflow chain is read, so that garbage is found early.
        if local < size and _varint(payload, 0)[0] > local:
            payload += self._overflow(page, at + local, size - local)
        types, start = _serial_types(payload, size)
        if len(payload) < size:
            payload += self._overflow(page, at + local, size - local)
        return Record(rowid - 2**64 if rowid >= 2**63 else rowid, _values(payload, types, start))

    def _local_bytes(self, size: int) -> int:
        """Return how many bytes of a payload are in the leaf itself."""
        most, least = self._usable - 35, (self._usable - 12) * 32 // 255 - 23
        if size <= most:
            return size
        local = least + (size - least) % (self._usable - 4)
        return local if local <= most else least

    def _overflow(self, page: bytes, at: int, length: int) -> bytes:
        """Return the rest of a payload.

        Only its last page may have no next page. Most chains that contain a page of another record violate this.
        """
        parts = []
        (number,) = struct.unpack_from(">I", page, at)
        seen = {0, 1}
        while length:
            if number in seen:
                raise ValueError("overflow chain too short or circular")
            seen.add(number)
            page = self._page(number)
            part = page[4 : 4 + length]
            (number,) = struct.unpack_from(">I", page)
            parts.append(part)
            length -= len(part)
        if number:
            raise ValueError("overflow chain too long")
        return b"".join(parts)


def _is_database_header(page: bytes) -> bool:
    return page[:16] == b"SQLite format 3\0" and page[21:24] == b"\x40\x20\x20"


def _page_bytes(file: RawFile) -> int | None:
    """Return the page size of a file, or None if the file has no valid header."""
    header = file.read(0, 100)
    page_bytes = int.from_bytes(header[16:18])
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    return page_bytes if _is_database_header(header) and page_bytes in PAGE_SIZES else None


def _likely_page_bytes(file: RawFile) -> int:
    """Return the page size with which most pages of a sample look like leaves of a table."""

    def leaves(page_bytes: int) -> float:
        step = max(1, file.size // page_bytes // _PROBED_PAGES) * page_bytes
        found = sum(_looks_like_leaf(file.read(at, page_bytes)) for at in range(0, file.size, step))
        return found * step / page_bytes

    return max(PAGE_SIZES, key=leaves)


def _looks_like_leaf(page: bytes) -> bool:
    offsets = _cell_offsets(page, 0)
    first_cell = 8 + 2 * int.from_bytes(page[3:5])
    return bool(offsets) and min(offsets) >= first_cell and max(offsets) < len(page) - 3


def _cell_offsets(page: bytes, start: int) -> list[int]:
    """Return the cell offsets in the page header at `start`; none if the page is not a leaf of a table.

    Offsets may point beyond the end of the page.
    """
    if len(page) < start + 8 or page[start] != _TABLE_LEAF:
        return []
    count = min(int.from_bytes(page[start + 3 : start + 5]), (len(page) - start - 8) // 2)
    offsets = struct.unpack_from(f">{count}H", page, start + 8)
    return [at for at in dict.fromkeys(offsets) if at >= start + 10]


def _serial_types(payload: bytes, size: int) -> tuple[list[int], int]:
    """Return the serial types of a record's values and the offset of the first value.

    Raises:
        ValueError: header and values do not add up to exactly `size` bytes.
    """
    header_bytes, at = _varint(payload, 0)
    if header_bytes > _MAX_HEADER_BYTES:
        raise ValueError("header too long")
    types = []
    total = header_bytes
    while at < header_bytes:
        serial_type, at = _varint(payload, at)
        total += (serial_type - 12) // 2 if serial_type >= 12 else _FIXED_BYTES[serial_type]
        types.append(serial_type)
    if not types or at != header_bytes or total != size:
        raise ValueError("header does not match the size of its record")
    return types, header_bytes


def _values(payload: bytes, types: list[int], at: int) -> tuple[int | float | str | bytes | None, ...]:
    values: list[int | float | str | bytes | None] = []
    for serial_type in types:
        if serial_type >= 12:
            data = payload[at : at + (serial_type - 12) // 2]
            values.append(data.decode() if serial_type % 2 else data)
            at += len(data)
        elif serial_type in {8, 9}:
            values.append(serial_type - 8)
        elif serial_type == 0:
            values.append(None)
        else:
            data = payload[at : at + _FIXED_BYTES[serial_type]]
            values.append(struct.unpack(">d", data)[0] if serial_type == 7 else int.from_bytes(data, signed=True))
            at += len(data)
    return tuple(values)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of 1 to 9 bytes and the offset after it."""
    value = 0
    for step in range(8):
        byte = data[at + step]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + step + 1
    return value << 8 | data[at + 8], at + 9

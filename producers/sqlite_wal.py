"""Finds committed page images in the write-ahead log (WAL) of an SQLite file; both may be damaged.

The layout of the WAL is https://www.sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import os
import struct
import sys
from contextlib import ExitStack
from pathlib import Path

PAGE_SIZES = (4096, 512, 1024, 2048, 8192, 16384, 32768, 65536)  # SQLite's default first
_WAL_MAGICS = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")  # the second one: checksums over big-endian words


class RawFile:
    """File that is read in pieces. It is not memory-mapped: a mapped page with a read error would end the process."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._fd = stack.enter_context(path.open("rb", buffering=0)).fileno()
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes; fewer at the end of the file, and none if the disk reports an error."""
        try:
            return os.pread(self._fd, length, offset)
        except OSError:
            return b""


class WriteAheadLog:
    """Offsets of the committed page images in a WAL: page number → offset of the newest image.

    A frame's checksum continues the checksum in the header of the previous frame. So a frame can be checked with its
    predecessor alone, and after a broken frame only the next frame is unreadable too.
    """

    def __init__(self, log: RawFile, page_bytes: int) -> None:
        self.page_bytes = wal_page_bytes(log) or page_bytes
        self.committed: dict[int, int] = {}  # images that SQLite itself would read
        self.after_break: dict[int, int] = {}  # images that SQLite drops; a crash may have rolled them back
        self._database_pages = 0
        self._is_whole = True  # all frames of the WAL's current round are readable
        header = log.read(0, 32)
        unbroken = wal_page_bytes(log) is not None
        order = (">" if header[3] & 1 else "<") if unbroken else ("<" if sys.byteorder == "little" else ">")
        salts = header[16:24] if unbroken else None
        before = header[16:]  # salts and checksum, like bytes 8 to 24 of a frame
        uncommitted: dict[int, int] = {}
        for offset in range(32, log.size, 24 + self.page_bytes):
            frame = log.read(offset, 24 + self.page_bytes)
            follows = len(frame) == 24 + self.page_bytes and _follows(frame, before, salts, order)
            before = frame[8:24]
            if not follows:
                unbroken = False
                self._is_whole = self._is_whole and salts is not None and _is_of_earlier_round(before, salts)
                continue
            salts = before[:8]
            number, database_pages = struct.unpack_from(">II", frame)
            uncommitted[number] = offset + 24
            if database_pages:
                (self.committed if unbroken else self.after_break).update(uncommitted)
                uncommitted.clear()
                self._database_pages = database_pages if unbroken else self._database_pages
        self._is_whole = self._is_whole and not uncommitted

    def supersedes(self, file_pages: int) -> bool:
        """Return whether the WAL's images are certainly newer than the pages of a file of `file_pages` pages.

        That is not certain if the WAL is damaged, because the file may have received newer images from it. The WAL must
        also prove that it was written for this file: it relies on pages that the file has, and on none that it lacks.
        """
        absent = (number for number in range(self._database_pages, 0, -1) if number not in self.committed)
        return self._is_whole and 0 < next(absent, 0) <= file_pages <= self._database_pages


def _follows(frame: bytes, before: bytes, salts: bytes | None, order: str) -> bool:
    if not any(frame[:4]) or frame[8:16] != before[:8] or (salts is not None and frame[8:16] != salts):
        return False
    checksum = struct.unpack_from(">II", before, 8)
    checksum = _checksum(frame[:8], order, *checksum)
    return _checksum(frame[24:], order, *checksum) == struct.unpack_from(">II", frame, 16)


def _is_of_earlier_round(before: bytes, salts: bytes) -> bool:
    """Return whether a frame is from an earlier round: SQLite adds 1 to the first salt when it restarts the WAL."""
    return len(before) == 16 and 0 < (int.from_bytes(salts[:4]) - int.from_bytes(before[:4])) % 2**32 < 2**24


def _checksum(data: bytes, order: str, first: int, second: int) -> tuple[int, int]:
    for one, two in struct.iter_unpack(f"{order}II", data):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second


def wal_page_bytes(log: RawFile) -> int | None:
    """Return the page size of a WAL, or None if the WAL has no valid header."""
    header = log.read(0, 32)
    if len(header) < 32 or header[:4] not in _WAL_MAGICS:
        return None
    if _checksum(header[:24], ">" if header[3] & 1 else "<", 0, 0) != struct.unpack_from(">II", header, 24):
        return None
    page_bytes = int.from_bytes(header[8:12])
    return page_bytes if page_bytes in PAGE_SIZES else None

"""Salvage of a damaged SQLite file and its write-ahead log: it reads every readable row, and no damage raises."""

from __future__ import annotations

import os
import random
import re
import shutil
import sqlite3
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import pytest

from producers.sqlite_salvage import Record, readable_records

_PAGE = 4096
_TABLE = """CREATE TABLE entries (
    position INTEGER PRIMARY KEY, source_id TEXT, sequence INTEGER, nonce TEXT, event TEXT, state TEXT,
    recorded REAL, row_id INTEGER, UNIQUE (source_id, sequence))"""


def _event(position: int, length: int) -> str:
    """Return a text that repeats its position at least every 13 bytes, so that a page shows which entries it has."""
    marker = f"<{position:06d}>ü—"
    return (marker * (length // 13 + 1))[:length]


def _length(position: int) -> int:
    """Return about 900 characters, but 20,000 for each 40th entry, which has overflow pages."""
    return 20_000 if position % 40 == 7 else 850 + position % 100


def _append(db: sqlite3.Connection, positions: Iterable[int], length: Callable[[int], int] = _length) -> None:
    with db:
        db.executemany(
            "INSERT INTO entries VALUES (?, 'trading-controller/1', ?, ?, ?, 'pending', ?, NULL)",
            ((n, n, f"{n:016x}", _event(n, length(n)), 1.7e9 + n / 8) for n in positions),
        )


def _opened(path: Path, *, page_bytes: int = _PAGE) -> sqlite3.Connection:
    """Create a database in WAL mode, whose log only `_checkpoint` copies into the file."""
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA page_size = {page_bytes}")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA wal_autocheckpoint = 0")
    db.execute("PRAGMA synchronous = OFF")
    db.execute(_TABLE)
    return db


def _checkpoint(db: sqlite3.Connection, mode: str = "TRUNCATE") -> None:
    assert db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()[0] == 0


def _copied(path: Path, to: Path) -> Path:
    """Copy the files of an open database, because closing it would remove its log."""
    to.mkdir(exist_ok=True)
    for source in (path, _wal(path)):
        if source.exists():
            shutil.copy(source, to / source.name)
    return to / path.name


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _selected(db: sqlite3.Connection) -> Counter[Record]:
    entries = db.execute("SELECT * FROM entries").fetchall()
    schema = db.execute("SELECT rowid, type, name, tbl_name, rootpage, sql FROM sqlite_schema").fetchall()
    return Counter(Record(n, (None, *rest)) for n, *rest in entries) + Counter(
        Record(n, (*rest,)) for n, *rest in schema
    )


def _entries(records: Iterable[Record]) -> set[Record]:
    return {record for record in records if len(record.values) == 8}


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _positions_within(path: Path, start: int, end: int, *, page_bytes: int = _PAGE) -> set[int]:
    """Return the entries of which a part is in the pages of the bytes from `start` to `end`."""
    with path.open("rb") as file:
        first = file.seek(start // page_bytes * page_bytes)
        data = file.read(-(-end // page_bytes) * page_bytes - first)
    return {int(position) for position in re.findall(rb"<(\d{6})>", data)}


def _pages_of_type(path: Path, kind: int) -> list[int]:
    data = path.read_bytes()
    return [n for n in range(1, len(data) // _PAGE) if data[n * _PAGE] == kind]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[Record]]:
    path = tmp_path_factory.mktemp("whole") / "outbox.db"
    with closing(_opened(path)) as db:
        for start in range(1, 600, 50):
            _append(db, range(start, start + 50))
        _checkpoint(db)
        return path, _entries(_selected(db))


@pytest.fixture
def whole(path: Path, made_once: tuple[Path, set[Record]]) -> tuple[Path, set[Record]]:
    """File of 600 entries without a log, and the entries as records."""
    shutil.copy(made_once[0], path)
    return path, made_once[1]


@pytest.mark.parametrize("page_bytes", [512, 1024, 4096, 65536])
def test_each_row_of_an_intact_file_is_read_once(path: Path, page_bytes: int) -> None:
    """Rows of every table and of the schema, with and without overflow pages."""
    with closing(_opened(path, page_bytes=page_bytes)) as db:
        _append(db, range(1, 200), lambda n: 2_000_000 if n % 90 == 5 else _length(n))
        _append(db, range(200, 240), lambda n: n - 200)  # including an empty text
        expected = _selected(db)
    assert not _wal(path).exists()
    assert Counter(readable_records(path)) == expected


def test_payloads_of_every_length_near_the_limits_of_a_page_are_read(path: Path) -> None:
    """SQLite splits a payload between its leaf and its overflow pages in three ways."""
    with closing(_opened(path)) as db:
        lengths = [*range(3900, 4140), *range(4480, 4700), *range(8000, 8300), *range(12_200, 12_400)]
        _append(db, range(1, 1 + len(lengths)), lambda n: lengths[n - 1])
        expected = _selected(db)
    assert Counter(readable_records(path)) == expected


def test_values_of_every_type_equal_those_of_select(path: Path) -> None:
    integers = [sign * (2**bits + step) for bits in (0, 7, 15, 23, 31, 47, 62) for step in (-1, 0) for sign in (1, -1)]
    values = [None, *integers, 2**63 - 1, -(2**63), 0.1, -1e300, 3.0, "", "ü—😀", "a\0b", b"", b"\xff" * 5000, b"\0"]
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, value)")
        for rowid in (-(2**63), -1, 0, 127, 128, 2**56 - 1, 2**56, 2**63 - 1):
            db.execute("INSERT INTO t VALUES (?, 1)", (rowid,))
        db.executemany("INSERT INTO t VALUES (?, ?)", enumerate(values, 1000))
        db.commit()
        expected = {Record(rowid, (None, value)) for rowid, value in db.execute("SELECT * FROM t")}
    found = [record for record in readable_records(path) if len(record.values) != 5]
    assert len(found) == len(expected)
    assert set(found) == expected
    types = {record.rowid: type(record.values[1]) for record in found}
    assert [types[n] for n in range(1000, 1000 + len(values))] == [type(value) for value in values]


def test_a_record_whose_header_extends_into_overflow_pages_is_read(path: Path) -> None:
    names = [f"c{n}" for n in range(900)]
    with closing(_opened(path, page_bytes=512)) as db:
        db.execute(f"CREATE TABLE wide ({', '.join(names)})")
        db.execute(f"INSERT INTO wide VALUES ({', '.join('?' for _ in names)})", [f"{n}" * 40 for n in range(900)])
        db.commit()
        (row,) = db.execute("SELECT * FROM wide").fetchall()
    assert [record for record in readable_records(path) if len(record.values) == 900] == [Record(1, row)]


def test_pages_with_reserved_bytes_are_read(path: Path) -> None:
    """Some builds of SQLite reserve bytes at the end of each page."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 1")  # makes SQLite write page 1
    _overwrite(path, 20, bytes([32]))
    _overwrite(path, 105, struct.pack(">H", _PAGE - 32))
    with closing(sqlite3.connect(path)) as db:
        db.execute(_TABLE)
        _append(db, range(1, 100))
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        expected = _selected(db)
    assert Counter(readable_records(path)) == expected


@pytest.mark.parametrize("checkpointed", [0, 300])
def test_rows_in_the_log_are_read_and_replace_older_ones(path: Path, checkpointed: int) -> None:
    with closing(_opened(path)) as db:
        if checkpointed:
            _append(db, range(1, 1 + checkpointed))
            _checkpoint(db)
        for start in range(400, 800, 50):
            _append(db, range(start, start + 50))
            with db:
                db.execute("UPDATE entries SET state = 'sent' WHERE position % 3 = 0")
        copy = _copied(path, path.parent / "copy")
        expected = _selected(db)
    assert _wal(copy).stat().st_size > 100 * _PAGE
    assert Counter(readable_records(copy)) == expected


def test_frames_from_before_a_restart_of_the_log_are_not_read(path: Path) -> None:
    """After a checkpoint SQLite overwrites the log from its start and leaves the old frames behind."""
    with closing(_opened(path)) as db:
        _append(db, range(1, 200))
        with db:
            db.execute("UPDATE entries SET state = 'sent'")
        _checkpoint(db, "RESTART")
        _append(db, range(200, 210))
        with db:
            db.execute("UPDATE entries SET state = 'done' WHERE position < 9")
        copy = _copied(path, path.parent / "copy")
        expected = _selected(db)
    assert Counter(readable_records(copy)) == expected


def test_a_transaction_without_its_commit_is_not_read(path: Path) -> None:
    with closing(_opened(path)) as db:
        _append(db, range(1, 50))
        expected = _entries(_selected(db))
        db.execute("PRAGMA cache_size = 5")  # the transaction exceeds the cache, so a part of it is in the log
        size = _wal(path).stat().st_size
        db.execute("BEGIN")
        for n in range(50, 150):
            db.execute("INSERT INTO entries (position, event) VALUES (?, ?)", (n, _event(n, 900)))
        assert _wal(path).stat().st_size > size + 20 * _PAGE
        copy = _copied(path, path.parent / "copy")
    assert _entries(readable_records(copy)) == expected


@pytest.mark.parametrize("seed", range(20))
def test_all_rows_outside_20_kb_of_garbage_are_read(whole: tuple[Path, set[Record]], seed: int) -> None:
    path, rows = whole
    dice = random.Random(seed)
    start = dice.randrange(path.stat().st_size - 20_000)
    lost = _positions_within(path, start, start + 20_000)
    _overwrite(path, start, dice.randbytes(20_000))

    found = _entries(readable_records(path))
    assert {row for row in rows if row.rowid not in lost} <= found <= rows
    assert found != rows


@pytest.mark.parametrize("page_bytes", [512, 4096, 8192, 65536])
@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 16,
        b"SQLite format 3\0\x02\0\1\1\0\0",
        random.Random(1).randbytes(512),
    ],
    ids=["magic", "fractions", "page"],
)
def test_a_file_without_its_first_page_is_read(path: Path, page_bytes: int, damage: bytes) -> None:
    """The page size is found by trial."""
    with closing(_opened(path, page_bytes=page_bytes)) as db:
        _append(db, range(1, 600))
        _checkpoint(db)
        expected = _entries(_selected(db))
    _overwrite(path, 0, damage)
    assert _entries(readable_records(path)) == expected


def test_every_leaf_is_read_without_root_and_interior_pages(whole: tuple[Path, set[Record]]) -> None:
    path, rows = whole
    inner = _pages_of_type(path, 5)
    assert inner
    for page in inner:
        _overwrite(path, page * _PAGE, random.Random(page).randbytes(_PAGE))
    with closing(sqlite3.connect(path)) as db, pytest.raises(sqlite3.DatabaseError):
        db.execute("SELECT count(event) FROM entries").fetchall()

    assert _entries(readable_records(path)) == rows


@pytest.mark.parametrize("damage", [b"\xff" * 9, b"\0\5\0", b"\1\5\1", b"\2\5\2\1", b"\2\5\2\x0a"])
def test_an_unreadable_cell_loses_only_its_own_row(whole: tuple[Path, set[Record]], damage: bytes) -> None:
    """Its payload has no end, is empty, has no columns, is too long or has an unknown type."""
    path, _ = whole
    rows = set(readable_records(path))
    page = _pages_of_type(path, 0x0D)[20] * _PAGE
    on_page = _positions_within(path, page, page + _PAGE)
    assert len(on_page) > 2
    first_cell = struct.unpack_from(">H", path.read_bytes(), page + 8)[0]
    _overwrite(path, page + first_cell, damage)

    found = set(readable_records(path))
    (lost,) = rows - found
    assert lost.rowid in on_page
    assert found < rows


@pytest.mark.parametrize("text", [b"\xff", b"\xc3"])
def test_a_row_whose_text_is_not_utf_8_is_skipped(whole: tuple[Path, set[Record]], text: bytes) -> None:
    path, rows = whole
    _overwrite(path, path.read_bytes().index(b"<000033>") + 1, text)
    assert rows - _entries(readable_records(path)) == {row for row in rows if row.rowid == 33}


@pytest.mark.parametrize("cut", [1, 100, 2047, 4095, 20_001, 333_333])
def test_the_rows_before_the_end_of_a_truncated_file_are_read(whole: tuple[Path, set[Record]], cut: int) -> None:
    path, rows = whole
    size = path.stat().st_size
    lost = _positions_within(path, size - cut, size)
    os.truncate(path, size - cut)

    found = _entries(readable_records(path))
    assert {row for row in rows if row.rowid not in lost} <= found <= rows


@pytest.mark.parametrize("end", range(200, 4096, 333))
def test_a_truncated_leaf_gives_no_wrong_row(whole: tuple[Path, set[Record]], end: int) -> None:
    path, rows = whole
    leaf = next(
        n for n in _pages_of_type(path, 0x0D)[20:] if len(_positions_within(path, n * _PAGE, n * _PAGE + 1)) > 2
    )
    os.truncate(path, leaf * _PAGE + end)
    assert _entries(readable_records(path)) <= rows


_Commits = list[tuple[int, set[Record]]]


@pytest.fixture(scope="module")
def log_made_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, _Commits]:
    path = tmp_path_factory.mktemp("logged") / "outbox.db"
    commits = []
    with closing(_opened(path)) as db:
        _append(db, range(1, 101))
        _checkpoint(db)
        commits.append((0, _entries(_selected(db))))
        for n in range(101, 201):
            _append(db, [n])
            commits.append((_wal(path).stat().st_size, _entries(_selected(db))))
        return _copied(path, path.parent / "copy"), commits


@pytest.fixture
def logged(tmp_path: Path, log_made_once: tuple[Path, _Commits]) -> tuple[Path, _Commits]:
    """File of 100 entries with 100 more in its log, and the length of the log and the rows after each commit."""
    return _copied(log_made_once[0], tmp_path / "logged"), log_made_once[1]


@pytest.mark.parametrize("cut", [1, 4119, 4121, 50_001, 250_000, 10**9])
def test_the_commits_before_the_end_of_a_truncated_log_are_read(logged: tuple[Path, _Commits], cut: int) -> None:
    copy, commits = logged
    size = max(0, _wal(copy).stat().st_size - cut)
    os.truncate(_wal(copy), size)
    assert _entries(readable_records(copy)) == [rows for end, rows in commits if end <= size][-1]


@pytest.mark.parametrize("at", [0, 3, 9, 17, 25, 32, 37, 41, 50, 500, *range(3001, 600_000, 40_009)])
def test_a_log_with_a_flipped_bit_loses_one_or_two_frames(logged: tuple[Path, _Commits], at: int) -> None:
    """SQLite itself would ignore all frames after it."""
    copy, commits = logged
    _overwrite(_wal(copy), at, bytes([_wal(copy).read_bytes()[at] ^ 1]))

    before = [rows for end, rows in commits if end <= at][-1]
    frame = max(at - 32, 0) // (_PAGE + 24) * (_PAGE + 24) + 32
    lost = _positions_within(_wal(copy), frame, frame + 2 * (_PAGE + 24), page_bytes=1)
    found = _entries(readable_records(copy))
    assert before <= found <= commits[-1][1]
    assert {row for row in commits[-1][1] if row.rowid not in lost} <= found


@pytest.mark.parametrize("damage", [random.Random(3).randbytes(20_000), bytes(20_000)], ids=["garbage", "zeros"])
def test_a_log_with_a_damaged_start_is_read_from_its_first_intact_frame(
    logged: tuple[Path, _Commits], damage: bytes
) -> None:
    copy, commits = logged
    lost = _positions_within(_wal(copy), 0, 30_000, page_bytes=1)
    _overwrite(_wal(copy), 0, damage)
    assert len(lost) < 40
    assert (
        {row for row in commits[-1][1] if row.rowid not in lost} <= _entries(readable_records(copy)) <= commits[-1][1]
    )


@pytest.mark.parametrize(
    ("grows", "kept"),
    [(True, 0), (True, 100), (False, 100), (False, -_PAGE - 24), (True, None), (False, None)],
)
def test_checkpointed_rows_are_read_beside_a_damaged_log(path: Path, grows: bool, kept: int | None) -> None:
    """The file may be newer than the rest of the log, which ends after or within a commit, or has zeros inside."""
    with closing(_opened(path)) as db:
        _append(db, range(1, 101))
        if not grows:
            with db:
                db.execute("DELETE FROM entries WHERE position > 9")
        _checkpoint(db)
        for n in range(201, 231):
            _append(db, [n])
        middle = _wal(path).stat().st_size
        for n in range(231, 261):
            _append(db, [n])
        _checkpoint(db, "PASSIVE")
        expected = _entries(_selected(db))
        copy = _copied(path, path.parent / "copy")
    if kept is None:
        _overwrite(_wal(copy), middle - 100, bytes(_wal(copy).stat().st_size - middle))
    else:
        os.truncate(_wal(copy), middle + kept)
    assert _entries(readable_records(copy)) >= expected


def test_the_rows_of_an_older_file_and_of_a_newer_log_are_read(path: Path) -> None:
    """A backup was restored with `cp`, but the log was not removed."""
    with closing(_opened(path)) as db:
        _append(db, range(1, 101))
        _checkpoint(db)
        older = _copied(path, path.parent / "older")
        first = _entries(_selected(db))
        _append(db, range(101, 301))
        _checkpoint(db)
        with db:
            db.execute("DELETE FROM entries WHERE position BETWEEN 50 AND 90")
        _append(db, range(301, 401))
        shutil.copy(_wal(path), _wal(older))
        last = {row for row in _entries(_selected(db)) if row.rowid > 301}
    assert _entries(readable_records(older)) >= first | last


@pytest.mark.parametrize("page_bytes", [4096, 1024])
@pytest.mark.parametrize("entries", [30, 300])
def test_the_rows_of_a_file_and_of_the_log_of_another_file_are_read(path: Path, page_bytes: int, entries: int) -> None:
    other = path.with_name("other.db")
    with closing(_opened(path)) as db, closing(_opened(other, page_bytes=page_bytes)) as other_db:
        _append(db, range(1, 101))
        _checkpoint(db)
        _append(other_db, range(1001, 1001 + entries))
        expected = _entries(_selected(db)) | _entries(_selected(other_db))
        copy = _copied(path, path.parent / "copy")
        shutil.copy(_wal(other), _wal(copy))
    assert _entries(readable_records(copy)) == expected


@pytest.mark.parametrize(("page", "follower"), [(0, "itself"), (0, 0), (0, 1), (1, 2**32 - 1), (-1, 20)])
def test_a_row_with_a_wrong_overflow_chain_is_skipped(
    whole: tuple[Path, set[Record]], page: int, follower: int | str
) -> None:
    """The chain is a cycle, ends early, leads out of the file or continues after its end."""
    path, rows = whole
    content = path.read_bytes()
    chain = [
        n
        for n in range(len(content) // _PAGE)
        if content[n * _PAGE] == 0 and b"<000047>" in content[n * _PAGE :][:_PAGE]
    ]
    assert len(chain) == 4
    number = chain[page] + 1
    _overwrite(path, chain[page] * _PAGE, struct.pack(">I", number if isinstance(follower, str) else follower))
    assert rows - _entries(readable_records(path)) == {row for row in rows if row.rowid == 47}


def test_a_record_with_more_columns_than_sqlite_allows_is_skipped(path: Path) -> None:
    """Its values would need many times the memory of its payload."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t (value)")
        db.execute("INSERT INTO t VALUES (zeroblob(?)), ('next')", (2_000_000,))
        db.commit()
    header = bytes([1 + len(_varint_of(4_000_012))]) + _varint_of(4_000_012)
    columns = _varint_of(2_000_000 + len(header))
    _overwrite(path, path.read_bytes().index(header + bytes(100)), columns.ljust(len(header), b"\0"))
    assert [record for record in readable_records(path) if len(record.values) != 5] == [Record(2, ("next",))]


def _varint_of(number: int) -> bytes:
    parts = [number & 0x7F]
    while number := number >> 7:
        parts.insert(0, number & 0x7F | 0x80)
    return bytes(parts)


def test_a_long_cyclic_chain_is_followed_once(path: Path, reads: list[int]) -> None:
    with closing(_opened(path)) as db:
        _append(db, [1], lambda _: 2_000_000)
    content = path.read_bytes()
    pages = len(content) // _PAGE
    first = next(n for n in range(pages) if b"<000001>" in content[n * _PAGE :][:_PAGE] and content[n * _PAGE] == 0)
    _overwrite(path, first * _PAGE, struct.pack(">I", first + 1))
    assert not _entries(readable_records(path))
    assert len(reads) < pages + 20


def test_identical_cell_pointers_give_one_row(whole: tuple[Path, set[Record]]) -> None:
    path, rows = whole
    page = _pages_of_type(path, 0x0D)[20] * _PAGE
    count, first = struct.unpack_from(">xxxHxxxH", path.read_bytes(), page)
    assert count > 2
    _overwrite(path, page + 8, struct.pack(">H", first) * count)
    found = Counter(record for record in readable_records(path) if len(record.values) == 8)
    assert max(found.values()) == 1
    assert len(found) == len(rows) - count + 1


def test_a_payload_of_more_than_64_mib_is_skipped(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t (value)")
        db.execute("INSERT INTO t VALUES (zeroblob(?)), ('next')", (64 * 2**20,))
        db.commit()
    assert [record for record in readable_records(path) if len(record.values) == 1] == [Record(2, ("next",))]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets of all reads of a file."""
    made: list[int] = []
    original = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        made.append(offset)
        return original(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    return made


def test_no_damage_raises_or_takes_long(path: Path, reads: list[int]) -> None:
    """300 random combinations of random bytes, zeros and moved pages in the file and its log."""
    with closing(_opened(path)) as db:
        _append(db, range(1, 80))
        _checkpoint(db)
        _append(db, range(80, 130))
        copy = _copied(path, path.parent / "copy")
    contents = {file: file.read_bytes() for file in (copy, _wal(copy))}
    pages = sum(map(len, contents.values())) // _PAGE
    for seed in range(300):
        dice = random.Random(seed)
        for file, content in contents.items():
            file.write_bytes(_damaged(content, dice))
        reads.clear()
        for record in readable_records(copy):
            assert isinstance(record.values, tuple)
        assert len(reads) < 50 * pages, f"seed {seed}"


def _damaged(content: bytes, dice: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(dice.choice([0, 1, 5, 50])):
        length = min(dice.choice([1, 2, 8, 100, 4096, 30_000]), len(data))
        at = dice.randrange(len(data) - length + 1)
        if dice.random() < 0.3:
            at = at // _PAGE * _PAGE  # damage the header of a page
        elsewhere = dice.randrange(len(data) - length + 1) // _PAGE * _PAGE
        kinds = [
            dice.randbytes(length),
            bytes(length),
            b"\xff" * length,
            b"\x0d" * length,
            data[elsewhere : elsewhere + length],
        ]
        data[at : at + length] = dice.choice(kinds)
    return bytes(data[: dice.choice([len(data), dice.randrange(len(data) + 1)])])


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"\0" * 100_000, b"\xff" * 100_000, b"no database\n" * 9999]
    + [random.Random(n).randbytes(200_000) for n in range(5)],
    ids=["empty", "one byte", "zeros", "ones", "text", *(f"random {n}" for n in range(5))],
)
def test_a_file_that_is_not_a_database_has_no_rows(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert list(readable_records(path)) == []
    shutil.copy(path, _wal(path))
    assert list(readable_records(path)) == []


def test_a_log_beside_an_empty_file_is_read(path: Path) -> None:
    with closing(_opened(path)) as db:
        _append(db, range(1, 50))
        copy = _copied(path, path.parent / "copy")
        expected = _selected(db)
    copy.write_bytes(b"")
    assert Counter(readable_records(copy)) == expected


def test_a_link_to_a_file_is_read_with_the_log_beside_the_file(tmp_path: Path, logged: tuple[Path, _Commits]) -> None:
    copy, commits = logged
    link = tmp_path / "link.db"
    link.symlink_to(copy)
    assert _entries(readable_records(link)) == commits[-1][1]


def test_pages_that_the_disk_cannot_read_are_skipped(
    whole: tuple[Path, set[Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows = whole
    lost = _positions_within(path, 50 * _PAGE, 60 * _PAGE)
    original = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if 50 * _PAGE <= offset < 60 * _PAGE:
            raise OSError(5, "Input/output error")
        return original(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    found = _entries(readable_records(path))
    assert lost
    assert found == {row for row in rows if row.rowid not in lost}


def test_a_file_that_cannot_be_opened_raises(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.db", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            list(readable_records(path))


def test_memory_does_not_depend_on_the_size_of_the_file(path: Path) -> None:
    with closing(_opened(path)) as db:
        _append(db, range(1, 1500), lambda _: 2000)
        _checkpoint(db)
        _append(db, range(1500, 1600), lambda _: 2000)
        copy = _copied(path, path.parent / "copy")
    assert copy.stat().st_size > 4 * 2**20
    tracemalloc.start()
    try:
        assert sum(len(record.values) == 8 for record in readable_records(copy)) == 1599
        assert tracemalloc.get_traced_memory()[1] < 2**19
    finally:
        tracemalloc.stop()

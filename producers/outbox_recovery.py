"""Takes entries out of another outbox file: one that was removed while it was open, or one that is damaged.

Entries keep their source, number and nonce, and so their job id: what Redis or the database has of them already is
recognized as the same delivery. An entry that the outbox has stays as it is there.
"""

from __future__ import annotations

import fcntl
import glob
import json
import logging
import os
import re
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from producers.outbox_file import OutboxFile
from producers.outbox_place import DAMAGED, TAKEN_OUT, alone_in
from producers.sqlite_salvage import readable_records

logger = logging.getLogger(__name__)

_COLUMNS = (
    "source_id", "sequence", "nonce", "recorder", "event_id", "type", "summary", "event", "state", "recorded_at",
    "checks", "check_at", "settled_at", "row_id", "reason",
)  # fmt: skip
# Of a file that the first releases have made, in their order.
_COLUMNS_BEFORE = tuple(name for name in _COLUMNS if name not in ("nonce", "recorder"))
_STATES = {"pending": "pending", "sent": "sent", "stored": "stored", "confirmed": "stored", "rejected": "rejected"}
_SOURCE_ID = re.compile("[0-9a-f]{32}")
_MOST_LOST_RANGES = 1000
_INSERT_PAGE = 500
_PROBED_RECORDS = 5000
_SALVAGED = ".salvaged-"
_LOG = "-wal"

# In the order of the columns: a file that is left behind is salvaged like a damaged one.
_COPY_OUT = (
    "CREATE TABLE taken_out.outbox AS SELECT * FROM main.outbox",
    "CREATE TABLE taken_out.sources AS SELECT * FROM main.sources",
    "CREATE TABLE taken_out.entries AS SELECT * FROM main.entries WHERE state IN ('pending', 'sent') ORDER BY position",
)
_CARRY_OVER = f"""
INSERT OR IGNORE INTO main.entries ({", ".join(_COLUMNS)})
SELECT {", ".join(_COLUMNS)} FROM taken_out.entries ORDER BY position
"""  # noqa: S608  # constants
# A page that was freed may have an old version of a row. Sending an entry once more than needed costs nothing.
_INSERT_SALVAGED = f"""
INSERT INTO entries ({", ".join(_COLUMNS)}) VALUES ({", ".join(f":{name}" for name in _COLUMNS)})
ON CONFLICT (source_id, sequence, nonce) DO UPDATE
    SET state = 'pending', checks = 0, check_at = NULL, settled_at = NULL, row_id = NULL, reason = NULL
    WHERE entries.state IN ('stored', 'rejected') AND excluded.state IN ('pending', 'sent')
"""  # noqa: S608  # constants

# A source goes on here, unless its name has another current one here.
_CONTINUE_SOURCE = """
INSERT INTO sources (id, name, last_sequence, resends, current, left_at, left_because)
VALUES (:id, :name, :last_sequence, :resends,
    :current AND NOT EXISTS (SELECT 1 FROM sources WHERE name = :name AND current), :left_at, :left_because)
ON CONFLICT (id) DO UPDATE SET last_sequence = max(last_sequence, excluded.last_sequence),
    resends = max(resends, excluded.resends)
"""
_SOURCE_COLUMNS = ("id", "name", "last_sequence", "resends", "current", "left_at", "left_because")
# A new file has the tokens of the one that it continues; any other has its own.
_CONTINUE_IDENTITY = """
UPDATE outbox SET token = ?, next_token = ?, redis = ?, queue = ? WHERE NOT EXISTS (SELECT 1 FROM sources)
"""


def copy_out(db: sqlite3.Connection) -> None:
    """Copy the identity, the sources and the unsettled entries into the attached database `taken_out`."""
    for statement in _COPY_OUT:
        db.execute(statement)


def carry_over(db: sqlite3.Connection) -> int:
    """Copy what `copy_out` has copied into this outbox, in the caller's transaction; how many entries are new."""
    identity = db.execute("SELECT token, next_token, redis, queue FROM taken_out.outbox").fetchone()
    db.execute(_CONTINUE_IDENTITY, identity)
    for row in db.execute(f"SELECT {', '.join(_SOURCE_COLUMNS)} FROM taken_out.sources").fetchall():  # noqa: S608  # constants
        db.execute(_CONTINUE_SOURCE, dict(zip(_SOURCE_COLUMNS, row, strict=True)))
    return db.execute(_CARRY_OVER).rowcount


_LOSE = "INSERT INTO losses (source_id, first, last, file) VALUES (?, ?, ?, ?)"


@dataclass
class Salvage:
    """What could be read from a damaged file: how many entries of it are new here, and which numbers are not in it.

    `unread` are inclusive ranges, by source: entries that are lost, unless they were settled and dropped long before.
    """

    file: Path
    entries: int = 0
    unread: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def summary(self) -> str:
        """For the log and for a person."""
        lost = "; ".join(f"{source}: {ranges_text(ranges)}" for source, ranges in self.unread.items())
        told = f" Sequence numbers that were not found: {lost}." if lost else ""
        return (
            f"salvaged {self.entries} entries from {self.file}.{told} Run trading-history audit: numbers that were not"
            " found, or are before the first one found, are lost unless the database has them"
        )


class Rescue:
    """Damaged files that were set aside beside the outbox in `file`.

    Raises:
        OutboxError: from every method, when the outbox cannot be read or written.
        OSError: from `salvage`, when the damaged file cannot be opened.
    """

    def __init__(self, file: OutboxFile) -> None:
        self._file = file

    def finish_renames(self) -> None:
        """For processes that died after they had renamed a damaged file or its log, and before the other of the two.

        A log that was set aside alone has entries of its own: it is salvaged beside an empty file.
        """
        real = self._file.place.real
        with alone_in(real.parent):
            for log in real.parent.glob(f"{glob.escape(real.name)}{DAMAGED}*{_LOG}"):
                file = log.with_name(log.name.removesuffix(_LOG))
                salvaged = file.with_name(file.name.replace(DAMAGED, _SALVAGED))
                if salvaged.exists():
                    log.rename(salvaged.with_name(salvaged.name + _LOG))
                else:
                    file.touch()

    def damaged_files(self) -> list[Path]:
        """Files that were set aside, and not salvaged yet; and what a process had taken out of one before it died."""
        return self._aside(DAMAGED) + [file for file in self._aside(TAKEN_OUT) if not _is_in_use(file)]

    def salvaged_files(self) -> list[Path]:
        """Files that were set aside, and whose readable entries are in this outbox."""
        return self._aside(_SALVAGED)

    def _aside(self, mark: str) -> list[Path]:
        real = self._file.place.real
        found = real.parent.glob(f"{glob.escape(real.name)}{mark}*")
        return sorted(one for one in found if not one.name.endswith((_LOG, "-shm", "-journal")))

    def salvage(self, file: Path) -> Salvage:
        """Carry over what can be read in a damaged file, and log what could not."""
        steps = self.salvaging(file)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found: Salvage = end.value
                return found

    def salvaging(self, file: Path) -> Generator[None, None, Salvage]:
        """What `salvage` does, some with each step."""
        found = yield from _salvage(file, self._file.transaction)
        logger.error("%s", found.summary())
        for end in ("", _LOG):  # the file first: a log alone is salvaged once more
            part = file.with_name(file.name + end)
            if TAKEN_OUT in part.name:
                part.unlink(missing_ok=True)
            elif DAMAGED in part.name and part.exists():
                part.rename(part.with_name(part.name.replace(DAMAGED, _SALVAGED)))
        return found

    def losses(self) -> dict[str, list[tuple[int, int]]]:
        """By source, the inclusive ranges of numbers that could not be read in damaged files."""
        found: dict[str, list[tuple[int, int]]] = {}
        with self._file.reading() as db:
            query = """
                SELECT name || '/' || source_id, first, last FROM losses JOIN sources ON id = source_id
                ORDER BY source_id, first
            """
            for source, first, last in db.execute(query):
                found.setdefault(source, []).append((first, last))
        return found


def has_content_of_an_outbox(file: Path) -> bool:
    """Whether entries or sources of an outbox are among the first records that can be read in a damaged file."""
    try:
        return any(
            _entry_of(record.values) or (len(record.values) == len(_SOURCE_COLUMNS) and _source_of(record.values))
            for record in islice(readable_records(file), _PROBED_RECORDS)
        )
    except OSError:
        return False


def _is_in_use(taken_out: Path) -> bool:
    """Whether the process that has made the file, or a child of it, is alive: it holds a lock on it."""
    try:
        descriptor = os.open(taken_out, os.O_RDONLY)
    except FileNotFoundError:
        return True  # no longer needed
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _salvage(
    file: Path, transaction: Callable[[], AbstractContextManager[sqlite3.Connection]]
) -> Generator[None, None, Salvage]:
    """Copy all that can be read in the damaged `file`, a page with each step; it may be begun again.

    Its sources are not continued: which number was the last is not certain.

    Raises:
        OSError: the file cannot be opened.
    """
    found = Salvage(file)
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    sources: dict[str, tuple[str, int]] = {}
    for page in _pages(readable_records(file)):
        entries = [entry for values in page if (entry := _entry_of(values))]
        for entry in entries:
            numbers[entry["source_id"]].add(entry["sequence"])
            sources.setdefault(entry["source_id"], (_name_in(entry["event"]), 0))
        for source_id, name, last in filter(None, map(_source_of, page)):
            sources[source_id] = (name, max(last, sources.get(source_id, ("", 0))[1]))
        with transaction() as db:
            found.entries += db.executemany(_INSERT_SALVAGED, entries).rowcount if entries else 0
        yield
    name_then = file.name.replace(DAMAGED, _SALVAGED)
    with transaction() as db:
        db.execute("DELETE FROM losses WHERE file = ?", (name_then,))
        for source_id, (name, last_known) in sources.items():
            have = sorted(numbers[source_id])
            last = max(last_known, *have[-1:], 0)
            source = {"id": source_id, "name": name, "last_sequence": last, "resends": 0, "current": 0}
            db.execute(_CONTINUE_SOURCE, source | {"left_at": None, "left_because": "damaged"})
            if unread := _gaps(have, last)[:_MOST_LOST_RANGES]:
                found.unread[f"{name}/{source_id}"] = unread
                db.executemany(_LOSE, [(source_id, first, end, name_then) for first, end in unread])
    return found


def _pages(records: Iterable[Any]) -> Iterator[list[Sequence[Any]]]:
    page: list[Sequence[Any]] = []
    for record in records:
        page.append(record.values)
        if len(page) == _INSERT_PAGE:
            yield page
            page = []
    yield page


def _entry_of(values: Sequence[Any]) -> dict[str, Any] | None:
    """The columns of an entry, from a record without names; None when it is none."""
    if len(values) == len(_COLUMNS) + 1:
        row = dict(zip(_COLUMNS, values[1:], strict=True))
    elif len(values) == len(_COLUMNS_BEFORE) + 1:
        row = {"nonce": "", "recorder": 0} | dict(zip(_COLUMNS_BEFORE, values[1:], strict=True))
    else:
        return None
    texts = all(isinstance(row[name], str) for name in ("source_id", "nonce", "event_id", "type", "summary", "event"))
    numbers = all(isinstance(row[name], int) for name in ("sequence", "recorder", "checks"))
    if not texts or not numbers or not _SOURCE_ID.fullmatch(row["source_id"]) or row["state"] not in _STATES:
        return None
    if not isinstance(row["recorded_at"], int | float) or not _is_intact(row):
        return None
    return row | {"state": _STATES[row["state"]]}


def _is_intact(row: Mapping[str, Any]) -> bool:
    """Whether the text is the event that the other columns name: a long one may have parts of another in it."""
    try:
        event = json.loads(row["event"])
        return (event["id"], int(event["sequence"])) == (row["event_id"], row["sequence"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _source_of(values: Sequence[Any]) -> tuple[str, str, int] | None:
    """Id, name and last number of a source."""
    if len(values) not in (3, 4, len(_SOURCE_COLUMNS)):
        return None
    source_id, name, last = values[:3]
    if not isinstance(source_id, str) or not isinstance(name, str) or not isinstance(last, int):
        return None
    return (source_id, name, last) if _SOURCE_ID.fullmatch(source_id) else None


def _name_in(event: str) -> str:
    """The source's name as the event has it, for a file whose sources cannot be read."""
    try:
        return str(json.loads(event)["source"]).rpartition("/")[0] or "unknown"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unknown"


def _gaps(numbers: Sequence[int], last: int) -> list[tuple[int, int]]:
    """Between the first of `numbers` and `last`; what was before the first one was settled and dropped."""
    gaps, before = [], numbers[0] if numbers else last
    for number in [*numbers, last + 1]:
        if number > before + 1:
            gaps.append((before + 1, number - 1))
        before = max(before, number)
    return gaps


def ranges_text(ranges: Sequence[tuple[int, int]]) -> str:
    """`2-3, 6`."""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)

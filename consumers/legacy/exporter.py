"""Export the tables to files of the old controller's format, which `consumers.legacy.legacy_json` defines.

The old format has no portfolio, no offset of a time, no ids and no sources: these are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import simplejson
from sqlalchemy import Connection, text

from consumers.db.engine import long_read
from consumers.errors import ExportRefused
from consumers.legacy.json_arrays import sync_directory, write_entries
from consumers.legacy.legacy_json import SNAPSHOTS_FILE, archive_entry, archives_file, history_files, snapshot_entry
from producers.errors import FileNotWritten
from producers.events import IMPORT_PREFIX, PortfolioSnapshot
from producers.times import read_back, wall_clock

_STAGING = ".export-"
_SNAPSHOTS_A_FETCH = 1000
_ARCHIVES_A_FETCH = 16  # few, because an archive has up to 8 MiB
_PROGRESS_STEP = 500

# array_position also finds NULL, which stands for rows without a portfolio.
_SELECTED = """
    (CAST(:portfolio_ids AS bigint[]) IS NULL
        OR array_position(CAST(:portfolio_ids AS bigint[]), portfolio_id) IS NOT NULL)
    AND (CAST(:since AS timestamptz) IS NULL OR {instant} >= :since)
    AND (CAST(:until AS timestamptz) IS NULL OR {instant} < :until)
"""

# Oldest first. Imported rows keep the order of their file, also where it is not the order of time (in an hour that the
# clock showed twice): the sort key of an entry is the newest time up to it.
_IN_ORDER = f"""
    CASE WHEN source LIKE '{IMPORT_PREFIX}%/%' THEN max({{instant}}) OVER (PARTITION BY source ORDER BY sequence)
        ELSE {{instant}} END,
    source, sequence, id
"""

_PORTFOLIOS = text(f"""
    SELECT portfolio_id, sum(number) AS number FROM (
        SELECT portfolio_id, count(*) AS number FROM portfolio_history
        WHERE {_SELECTED.format(instant='"timestamp"')} GROUP BY portfolio_id
        UNION ALL
        SELECT portfolio_id, count(*) FROM signal_archives
        WHERE {_SELECTED.format(instant="archived_at")} GROUP BY portfolio_id) AS rows
    GROUP BY portfolio_id ORDER BY portfolio_id NULLS FIRST
""")  # noqa: S608  # built from the constants above; values are parameters

_MONTHS = text(f"""
    SELECT DISTINCT archive_month FROM signal_archives WHERE {_SELECTED.format(instant="archived_at")}
    ORDER BY archive_month
""")  # noqa: S608  # built from the constants above; values are parameters

_SNAPSHOTS = text(f"""
    SELECT snapshot_date, "timestamp", balance, total_invested, total_profit_loss, total_value, open_positions,
        trade_count
    FROM portfolio_history WHERE {_SELECTED.format(instant='"timestamp"')}
    ORDER BY {_IN_ORDER.format(instant='"timestamp"')}
""")  # noqa: S608  # built from the constants above; values are parameters

# Sort in the subquery, which refers to long values without reading them; convert them to text outside, one at a time.
_ARCHIVES = text(f"""
    SELECT archived_at, signals_count, CAST(signals_data AS text) AS signals
    FROM (
        SELECT archived_at, signals_count, signals_data
        FROM signal_archives WHERE archive_month = :month AND {_SELECTED.format(instant="archived_at")}
        ORDER BY {_IN_ORDER.format(instant="archived_at")}
        OFFSET 0) AS ordered
""")  # noqa: S608  # built from the constants above; values are parameters


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Filter of the exported rows, by portfolio and period.

    None in `portfolio_ids` stands for rows without a portfolio. If `portfolio_ids` is None, all rows must have the same
    portfolio. `since` is inclusive, `until` is exclusive; both are aware.
    """

    portfolio_ids: Sequence[int | None] | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        chosen = None if self.portfolio_ids is None else list(self.portfolio_ids)
        return {"portfolio_ids": chosen, "since": self.since, "until": self.until}


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A written file.

    `ambiguous` counts entries in the second of two equal hours, after the clock was set back, that no earlier entry
    marks as such: an import reads their times as in the first hour.
    """

    file: str
    entries: int
    ambiguous: int


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of an export.

    `files` were written. `untouched` are files of the old format that were in the folder and that this export does not
    write. `unfinished` are folders of exports that were killed or are still running.
    """

    files: list[ExportedFile]
    untouched: list[str]
    unfinished: list[str]


@dataclass
class _Statistics:
    """Counts the entries of a file, and those whose time a reader of the file would misread."""

    zone: tzinfo | None
    total: int
    on_progress: Callable[[int, int], None]
    done: int = 0
    ambiguous: int = 0
    _read: datetime | None = None

    def begin_file(self) -> None:
        self.ambiguous, self._read = 0, None

    def count(self, instant: datetime) -> None:
        self.done += 1
        self._read = read_back(wall_clock(instant, self.zone), self.zone, self._read, "timestamp")
        self.ambiguous += self._read != instant
        if self.done % _PROGRESS_STEP == 0 or self.done == self.total:
            self.on_progress(self.done, self.total)


def no_progress(_done: int, _total: int) -> None:
    """Ignore the progress."""


def export_history(
    directory: Path,
    selection: Selection,
    *,
    zone: tzinfo | None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = no_progress,
) -> Exported:
    """Write portfolio_history.json and a signals_archive_YYYY-MM.json for each month into `directory`.

    The files show one moment of the database, oldest entry first; entries of an imported file keep their order. Rows
    are streamed. Times are local times in `zone` (None: this machine's zone), without offset. The new files replace the
    old ones only when all of them are complete; until then `directory` keeps the old ones, whatever happens.
    `on_progress` is called with the number of entries written so far and their total number.

    Raises:
        ExportRefused: `directory` is not a folder, such files exist and `overwrite` is false, no row is selected, or
            rows of several portfolios are selected without `portfolio_ids`.
        FileNotWritten: the folder or a file cannot be written.
        StoreUnavailable: the database cannot be read now.
    """
    if directory.exists() and not directory.is_dir():
        raise ExportRefused(f"{directory} is not a folder: give the path of a folder, which may be new")
    if (existing := sorted(file.name for file in history_files(directory))) and not overwrite:
        raise ExportRefused(
            f"{directory} already has {_some(existing)}; --overwrite replaces the files that are exported"
        )
    if odd := [name for name in existing if (directory / name).is_symlink() or not (directory / name).is_file()]:
        raise ExportRefused(f"{directory}: {_some(odd)} cannot be replaced: not a regular file")
    unfinished = sorted(folder.name for folder in directory.glob(f"{_STAGING}*"))
    with long_read() as db:
        statistics = _Statistics(zone, _number_of_rows(db, selection), on_progress)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=_STAGING, dir=directory) as staging:
                files = _write_files(db, Path(staging), selection, statistics)
                _publish(Path(staging), directory, files)
        except OSError as error:
            raise FileNotWritten(directory, error) from error
    written = {one.file for one in files}
    return Exported(files=files, untouched=[name for name in existing if name not in written], unfinished=unfinished)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _number_of_rows(db: Connection, selection: Selection) -> int:
    numbers = {row.portfolio_id: int(row.number) for row in db.execute(_PORTFOLIOS, selection.parameters)}
    if not numbers:
        raise ExportRefused("no rows to export")
    if selection.portfolio_ids is None and len(numbers) > 1:
        portfolios = ", ".join("none" if one is None else str(one) for one in numbers)
        raise ExportRefused(
            f"rows of several portfolios ({portfolios}), which the old format cannot tell apart:"
            " choose with --portfolio-id"
        )
    return sum(numbers.values())


def _write_files(db: Connection, staging: Path, selection: Selection, statistics: _Statistics) -> list[ExportedFile]:
    """Write the files into `staging`. Return those that have entries."""
    entries: dict[str, Iterator[dict[str, Any]]] = {SNAPSHOTS_FILE: _snapshots(db, selection.parameters, statistics)}
    for month in db.execute(_MONTHS, selection.parameters).scalars():
        parameters = selection.parameters | {"month": month}
        entries[archives_file(month)] = _archives(db, parameters, statistics)
    files = []
    for name, of_file in entries.items():
        statistics.begin_file()
        count = write_entries(staging / name, of_file)
        files.append(ExportedFile(file=name, entries=count, ambiguous=statistics.ambiguous))
    return [one for one in files if one.entries]


def _snapshots(db: Connection, parameters: Mapping[str, Any], statistics: _Statistics) -> Iterator[dict[str, Any]]:
    rows = db.execute(_SNAPSHOTS, parameters, execution_options={"yield_per": _SNAPSHOTS_A_FETCH})
    for row in rows.mappings():
        statistics.count(row["timestamp"])
        yield snapshot_entry(PortfolioSnapshot.model_construct(**row), statistics.zone)


def _archives(db: Connection, parameters: Mapping[str, Any], statistics: _Statistics) -> Iterator[dict[str, Any]]:
    rows = db.execute(_ARCHIVES, parameters, execution_options={"yield_per": _ARCHIVES_A_FETCH})
    for row in rows:
        statistics.count(row.archived_at)
        yield archive_entry(row.archived_at, simplejson.RawJSON(row.signals), row.signals_count, statistics.zone)


def _publish(staging: Path, directory: Path, files: Sequence[ExportedFile]) -> None:
    for one in files:
        (staging / one.file).replace(directory / one.file)
    sync_directory(directory)

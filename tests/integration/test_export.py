"""The export: its files, its errors, and that a failure keeps the old files."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import simplejson
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.db.inserts import insert_events
from producers.events import PortfolioSnapshot, SignalArchive, event_of
from tests.documents import block
from tests.factories import INSTANT, a_signal, a_snapshot, an_archive

pytestmark = pytest.mark.usefixtures("database_url")

PROGRAM = [sys.executable, "-m", "consumers.cli"]
_BERLIN = ("--timezone", "Europe/Berlin")
_OLD = '[{"old": true}]'


def _run(*arguments: str, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, "export", *arguments], capture_output=True, text=True, timeout=60, check=False, preexec_fn=before
    )


def _store(*payloads: PortfolioSnapshot | SignalArchive, source: str = "direct", first: int | None = None) -> None:
    numbers = [None if first is None else first + n for n in range(len(payloads))]
    with get_db() as db:
        insert_events(db, [event_of(one, source=source, sequence=n) for one, n in zip(payloads, numbers, strict=True)])


def _store_many(number: int) -> None:
    with get_db() as db:
        db.execute(
            text("""
                INSERT INTO portfolio_history (event_id, source, snapshot_date, "timestamp", balance, total_invested,
                    total_profit_loss, total_value, open_positions, trade_count)
                SELECT gen_random_uuid(), 'direct', '2025-01-01', timestamptz '2025-01-01Z' + n * interval '1s',
                    n, 0, 0, n, 0, 0 FROM generate_series(1, :number) AS n"""),
            {"number": number},
        )


def _read(path: Path) -> Any:
    return json.loads(path.read_text("ascii"), parse_float=Decimal)


def test_the_tables_are_written_as_files_of_the_old_format(tmp_path: Path) -> None:
    """Oldest first, a file per month, local times without offset, amounts as numbers, signals unchanged."""
    signals = [a_signal(exact=Decimal("0.10000000000000000001"))]
    _store(
        a_snapshot(after=timedelta(days=1)), a_snapshot(balance="0.00000001", timestamp=INSTANT.replace(microsecond=0))
    )
    _store(an_archive(signals=signals), an_archive(after=timedelta(days=-30)))

    run = _run("out/new", *_BERLIN, "--json")

    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout) == {
        "files": [
            {"file": "portfolio_history.json", "entries": 2, "ambiguous": 0},
            {"file": "signals_archive_2026-10.json", "entries": 1, "ambiguous": 0},
            {"file": "signals_archive_2026-11.json", "entries": 1, "ambiguous": 0},
        ],
        "untouched": [],
        "unfinished": [],
        "entries": 4,
    }
    first, second = _read(tmp_path / "out/new/portfolio_history.json")
    assert first == {
        "date": "2026-11-22",
        "timestamp": "2026-11-22T18:02:46",
        "balance": Decimal("0.00000001"),
        "total_invested": Decimal(100),
        "total_profit_loss": Decimal("197.25"),
        "total_value": Decimal("10097.37"),
        "open_positions": 1,
        "trade_count": 2,
    }
    assert second["timestamp"] == "2026-11-23T18:02:46.101234"
    assert '"total_invested": 100.0, ' in (tmp_path / "out/new/portfolio_history.json").read_text()
    (archive,) = _read(tmp_path / "out/new/signals_archive_2026-11.json")
    assert archive == {
        "archived_at": "2026-11-22T18:02:46.101234",
        "signals_count": 1,
        "signals": json.loads(simplejson.dumps(signals, use_decimal=True), parse_float=Decimal),
    }
    assert sorted(path.name for path in (tmp_path / "out/new").iterdir()) == [
        "portfolio_history.json",
        "signals_archive_2026-10.json",
        "signals_archive_2026-11.json",
    ]


def test_the_command_of_the_document_exports_one_portfolio(tmp_path: Path) -> None:
    _store(a_snapshot(portfolio_id=1), a_snapshot(portfolio_id=2))
    program, command, *arguments = block("consumers/legacy/README.md", "export").split()
    assert (program, command) == ("trading-history", "export")
    assert _run(*arguments).returncode == 0
    assert len(_read(tmp_path / "data/history/portfolio_history.json")) == 1


def test_the_summary_lists_files_and_entries(tmp_path: Path) -> None:
    """A pipe gets no progress bar."""
    _store(a_snapshot(), a_snapshot(after=timedelta(1)))
    run = _run("out")
    assert run.stdout.splitlines() == [
        "file                    entries",
        "portfolio_history.json        2",
        "",
        "2 entries in 1 file in out",
    ]
    assert run.stderr == ""


def test_imported_entries_keep_the_order_of_their_file(tmp_path: Path) -> None:
    """Also where it is not the order of time. Rows of other sources are sorted in by their time."""
    minutes = [0, 10, 5, 20]
    _store(
        *(a_snapshot(after=timedelta(minutes=n)) for n in minutes), source="import/portfolio_history.json/1", first=0
    )
    _store(a_snapshot(after=timedelta(minutes=30)), a_snapshot(after=timedelta(minutes=15)))

    _run("out", "--timezone", "UTC")

    seen = [entry["timestamp"][14:16] for entry in _read(tmp_path / "out/portfolio_history.json")]
    assert seen == ["02", "12", "07", "17", "22", "32"]


def test_rows_of_several_portfolios_are_mixed_only_if_they_are_named(tmp_path: Path) -> None:
    """The error lists the portfolios. Each one, rows without one, or several can be chosen."""
    _store(a_snapshot(portfolio_id=None), a_snapshot(portfolio_id=2), an_archive(portfolio_id=11))

    failed = _run("out")
    assert (failed.returncode, failed.stdout, failed.stderr) == (
        1,
        "",
        "error: rows of several portfolios (none, 2, 11), which the old format cannot tell apart:"
        " choose with --portfolio-id\n",
    )
    assert not (tmp_path / "out").exists()
    written = {
        names: [one["entries"] for one in json.loads(_run("-".join(names), *_chosen(names), "--json").stdout)["files"]]
        for names in (("2",), ("none",), ("11",), ("none", "2"), ("none", "2", "11"))
    }
    assert list(written.values()) == [[1], [1], [1], [2], [2, 1]]


def _chosen(names: tuple[str, ...]) -> list[str]:
    return [argument for name in names for argument in ("--portfolio-id", name)]


def test_a_period_can_be_chosen(tmp_path: Path) -> None:
    """`--since` is inclusive, `--until` exclusive. Both are local times in the zone of the files."""
    hours = [datetime(2026, 1, 1, hour, tzinfo=UTC) for hour in (8, 9, 10)]
    _store(*(a_snapshot(timestamp=hour, snapshot_date=date(2026, 1, 1)) for hour in hours))

    _run("out", *_BERLIN, "--since", "2026-01-01T10:00:00", "--until", "2026-01-01T11:00:00")

    assert [entry["timestamp"] for entry in _read(tmp_path / "out/portfolio_history.json")] == ["2026-01-01T10:00:00"]


def test_ambiguous_times_are_counted(tmp_path: Path) -> None:
    """A time in the second of two equal hours is ambiguous if no earlier entry shows that it is in the second."""
    change = datetime(2025, 10, 26, 1, tzinfo=UTC)  # in Berlin 03:00 becomes 02:00
    lone, preceded = [change + timedelta(minutes=5)], [change - timedelta(minutes=20), change + timedelta(minutes=5)]
    _store(*(a_snapshot(timestamp=moment, portfolio_id=1) for moment in lone))
    _store(*(a_snapshot(timestamp=moment, portfolio_id=2) for moment in preceded))

    alone, in_order = (_run(f"out{n}", *_BERLIN, "--portfolio-id", n) for n in ("1", "2"))

    assert alone.stderr == (
        "note: 1 entries are from an hour that the clock showed twice, and from its second time;"
        " the format has no offset, so an import reads them as the first time\n"
    )
    assert (alone.returncode, in_order.returncode, in_order.stderr) == (0, 0, "")


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Asia/Kolkata"])
def test_yesterday_is_a_day_in_the_zone_of_the_files(zone: str) -> None:
    """Not in the zone of the settings."""
    midnight = datetime.now(ZoneInfo(zone)).replace(hour=0, minute=0, second=0, microsecond=0)
    hours = [timedelta(hours=hour) for hour in (-25, -23, -1, 1)]
    times = [(midnight + hour).astimezone(UTC) for hour in hours]
    _store(*(a_snapshot(timestamp=at, snapshot_date=at.date(), trade_count=n) for n, at in enumerate(times)))

    run = _run("out", "--timezone", zone, "--since", "yesterday", "--until", "today")
    assert run.returncode == 0
    assert [one["trade_count"] for one in _read(Path("out/portfolio_history.json"))] == [1, 2]


@pytest.mark.parametrize("arguments", [[], ["--portfolio-id", "5"], ["--since", "2030-01-01"]])
def test_nothing_to_export_is_an_error_and_writes_nothing(tmp_path: Path, arguments: list[str]) -> None:
    """A wrong database or portfolio must not replace a history with empty files."""
    if arguments:
        _store(a_snapshot())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/portfolio_history.json").write_text(_OLD)
    run = _run("out", "--overwrite", *arguments)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "error: no rows to export\n")
    assert (tmp_path / "out/portfolio_history.json").read_text() == _OLD


def test_a_folder_with_the_name_of_a_file_prevents_the_export(tmp_path: Path) -> None:
    """It is found before the first file is replaced."""
    _store(a_snapshot())
    (tmp_path / "out/signals_archive_2020-01.json").mkdir(parents=True)
    (tmp_path / "out/portfolio_history.json").write_text(_OLD)
    run = _run("out", "--overwrite")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "error: out: signals_archive_2020-01.json cannot be replaced: not a regular file\n"
    assert (tmp_path / "out/portfolio_history.json").read_text() == _OLD


def test_existing_files_are_replaced_only_on_request(tmp_path: Path) -> None:
    """--overwrite replaces the files that are exported. A note names the others, which are kept."""
    _store(a_snapshot())
    names = ["portfolio_history.json", "signals_archive_2020-01.json"]
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text(_OLD)

    failed, replaced = _run("out"), _run("out", "--overwrite")

    assert (failed.returncode, failed.stderr) == (
        1,
        f"error: out already has {', '.join(names)}; --overwrite replaces the files that are exported\n",
    )
    assert (replaced.returncode, replaced.stderr) == (
        0,
        "note: left unchanged, because they are not part of this export: signals_archive_2020-01.json\n",
    )
    assert len(_read(tmp_path / "out" / names[0])) == 1
    assert (tmp_path / "out" / names[1]).read_text() == _OLD


def test_wrong_usage_exits_2() -> None:
    """An unknown zone, a portfolio that is not a number, or no folder."""
    runs = [_run("out", "--timezone", "Middle/Earth"), _run("out", "--portfolio-id", "first"), _run()]
    assert [run.returncode for run in runs] == [2, 2, 2]


@pytest.mark.parametrize("directory", ["file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_written_is_an_error_in_one_line(tmp_path: Path, directory: str) -> None:
    """The error names the folder and the system's reason."""
    _store(a_snapshot())
    (tmp_path / "file").touch()
    run = _run(directory)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert run.stderr.startswith((f"error: {directory}: ", f"error: {directory} is not a folder: "))


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, although only the last is too large. No temporary file remains."""
    monkeypatch.delenv("COVERAGE_PROCESS_START", raising=False)  # its file would be too large too
    _store(a_snapshot(), an_archive(), an_archive(after=timedelta(days=30), signals=[a_signal(reason="x" * 200_000)]))
    names = ["portfolio_history.json", "signals_archive_2026-11.json", "signals_archive_2026-12.json"]
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text(_OLD)

    run = _run("out", "--overwrite", before=_limited)

    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert run.stderr.endswith("signals_archive_2026-12.json: File too large\n")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == dict.fromkeys(names, _OLD)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_export_keeps_the_old_files(tmp_path: Path, how: signal.Signals) -> None:
    """SIGINT and SIGTERM leave no temporary folder. After kill -9, the next export names the folder and works."""
    _store_many(100_000)
    out = tmp_path / "out"
    out.mkdir()
    (out / "portfolio_history.json").write_text(_OLD)
    process = subprocess.Popen([*PROGRAM, "export", "out", "--overwrite"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in out.glob(".export-*/.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, how)
    status = process.wait(20)

    left = sorted(path.name for path in out.iterdir() if path.name != "portfolio_history.json")
    assert (out / "portfolio_history.json").read_text() == _OLD
    assert status == (-how if how == signal.SIGKILL else 128 + how)
    assert len(left) == (how == signal.SIGKILL)
    again = _run("out", "--overwrite")
    assert (again.returncode, len(_read(out / "portfolio_history.json"))) == (0, 100_000)
    note = "note: temporary files of exports that were killed or are still running: "
    assert again.stderr == "".join(f"{note}{name}\n" for name in left)


def test_all_files_show_one_moment_of_the_database(tmp_path: Path) -> None:
    """Rows that are stored during an export are in none of its files."""
    from consumers.legacy.exporter import Selection, export_history

    _store(a_snapshot(), an_archive())

    def store_another(done: int, total: int) -> None:
        _store(an_archive(after=timedelta(seconds=done)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("consumers.legacy.exporter._PROGRESS_STEP", 1)
        exported = export_history(tmp_path / "out", Selection(), zone=UTC, on_progress=store_another)

    assert [(one.file, one.entries) for one in exported.files] == [
        ("portfolio_history.json", 1),
        ("signals_archive_2026-11.json", 1),
    ]

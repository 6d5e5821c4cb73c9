"""The export: what it writes, what it refuses, and that a failure leaves the files that were there."""

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

import pytest
import simplejson
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.db.inserts import insert_events
from producers.events import PortfolioSnapshot, SignalArchive, event_of
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


def test_the_tables_become_files_of_the_old_format(tmp_path: Path) -> None:
    """Oldest first, a file a month, local times without offset, amounts as numbers, signals as they are stored."""
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


def test_a_summary_is_printed_for_a_person(tmp_path: Path) -> None:
    """Files and entries, and no bar in a pipe."""
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
    """Also where that is not the order of time; what was recorded otherwise stands between them by its time."""
    minutes = [0, 10, 5, 20]
    _store(
        *(a_snapshot(after=timedelta(minutes=n)) for n in minutes), source="import/portfolio_history.json/1", first=0
    )
    _store(a_snapshot(after=timedelta(minutes=30)), a_snapshot(after=timedelta(minutes=15)))

    _run("out", "--timezone", "UTC")

    seen = [entry["timestamp"][14:16] for entry in _read(tmp_path / "out/portfolio_history.json")]
    assert seen == ["02", "12", "07", "17", "22", "32"]


def test_rows_of_several_portfolios_are_not_mixed_unless_they_are_named(tmp_path: Path) -> None:
    """The error lists them; each can be exported alone, the one without a number too, or several by intent."""
    _store(a_snapshot(portfolio_id=None), a_snapshot(portfolio_id=2), an_archive(portfolio_id=11))

    refused = _run("out")
    assert (refused.returncode, refused.stdout, refused.stderr) == (
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


def test_a_period_can_be_chosen_in_the_files_zone(tmp_path: Path) -> None:
    """since is inclusive, until is not; both are times of the zone that the files get."""
    hours = [datetime(2026, 1, 1, hour, tzinfo=UTC) for hour in (8, 9, 10)]
    _store(*(a_snapshot(timestamp=hour, snapshot_date=date(2026, 1, 1)) for hour in hours))

    _run("out", *_BERLIN, "--since", "2026-01-01T10:00:00", "--until", "2026-01-01T11:00:00")

    assert [entry["timestamp"] for entry in _read(tmp_path / "out/portfolio_history.json")] == ["2026-01-01T10:00:00"]


def test_times_that_the_format_cannot_tell_apart_are_counted(tmp_path: Path) -> None:
    """Of the hour that is shown twice: only where no earlier entry shows that it is the second."""
    change = datetime(2025, 10, 26, 1, tzinfo=UTC)  # in Berlin 03:00 becomes 02:00
    lone, told = [change + timedelta(minutes=5)], [change - timedelta(minutes=20), change + timedelta(minutes=5)]
    _store(*(a_snapshot(timestamp=moment, portfolio_id=1) for moment in lone))
    _store(*(a_snapshot(timestamp=moment, portfolio_id=2) for moment in told))

    alone, in_order = (_run(f"out{n}", *_BERLIN, "--portfolio-id", n) for n in ("1", "2"))

    assert alone.stderr == (
        "note: 1 entries are from the second of two equal hours, after the clock was set back;"
        " the format has no offset, so an import takes them for the first hour\n"
    )
    assert (alone.returncode, in_order.returncode, in_order.stderr) == (0, 0, "")


@pytest.mark.parametrize("arguments", [[], ["--portfolio-id", "5"], ["--since", "2030-01-01"]])
def test_nothing_to_export_is_an_error_and_writes_nothing(tmp_path: Path, arguments: list[str]) -> None:
    """A wrong database or a wrong number must not replace a history with nothing."""
    if arguments:
        _store(a_snapshot())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/portfolio_history.json").write_text(_OLD)
    run = _run("out", "--overwrite", *arguments)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "error: no rows to export\n")
    assert (tmp_path / "out/portfolio_history.json").read_text() == _OLD


def test_beside_a_folder_with_the_name_of_a_file_nothing_is_replaced(tmp_path: Path) -> None:
    """It is found before the first file takes its place."""
    _store(a_snapshot())
    (tmp_path / "out/signals_archive_2020-01.json").mkdir(parents=True)
    (tmp_path / "out/portfolio_history.json").write_text(_OLD)
    run = _run("out", "--overwrite")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "error: out: signals_archive_2020-01.json cannot be replaced: not a plain file\n"
    assert (tmp_path / "out/portfolio_history.json").read_text() == _OLD


def test_existing_files_are_replaced_only_on_request(tmp_path: Path) -> None:
    """--overwrite replaces those that are exported; the others stay, and that is said."""
    _store(a_snapshot())
    names = ["portfolio_history.json", "signals_archive_2020-01.json"]
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text(_OLD)

    refused, replaced = _run("out"), _run("out", "--overwrite")

    assert (refused.returncode, refused.stderr) == (
        1,
        f"error: out has {', '.join(names)} already; --overwrite replaces what is exported\n",
    )
    assert (replaced.returncode, replaced.stderr) == (
        0,
        "note: left unchanged, because they are not part of this export: signals_archive_2020-01.json\n",
    )
    assert len(_read(tmp_path / "out" / names[0])) == 1
    assert (tmp_path / "out" / names[1]).read_text() == _OLD


def test_wrong_usage_exits_2() -> None:
    """A zone or a portfolio that is none."""
    runs = [_run("out", "--timezone", "Middle/Earth"), _run("out", "--portfolio-id", "first"), _run()]
    assert [run.returncode for run in runs] == [2, 2, 2]


@pytest.mark.parametrize("directory", ["file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, directory: str) -> None:
    """Which names the folder and the system's reason."""
    _store(a_snapshot())
    (tmp_path / "file").touch()
    run = _run(directory)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert run.stderr.startswith(f"error: {directory}: ")


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_leaves_the_files_that_were_there(tmp_path: Path) -> None:
    """All of them, though only the last is too large; nothing else stays in the folder."""
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
def test_an_export_that_is_killed_leaves_the_files_that_were_there(tmp_path: Path, how: signal.Signals) -> None:
    """A signal that can be caught leaves nothing else; after kill -9 the next export says what is left, and goes on."""
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


def test_all_files_are_of_one_moment(tmp_path: Path) -> None:
    """What is stored while an export runs is in none of its files."""
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

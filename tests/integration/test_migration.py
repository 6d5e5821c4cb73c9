"""Import and verify on real servers: every entry becomes a row or a reported rejection, also after crashes."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import Connection, make_url, text

from consumers.db.engine import engine, get_db
from consumers.db.inserts import insert_events
from consumers.embedded.child_processes import worker_process
from consumers.legacy.comparison import RowIds
from consumers.legacy.entries_in_progress import EntriesInProgress
from consumers.legacy.import_report import Report
from consumers.legacy.importer import Importer, dry_run
from consumers.legacy.old_history import ImportStatistics, OldHistory, file_sources
from consumers.legacy.verification import Difference, Verification
from consumers.ops.audit import audit
from consumers.ops.failed import discard, requeue
from consumers.ops.rejections import rejections
from consumers.worker import batch
from producers.errors import HistoryError
from producers.events import Event
from producers.history_producer import HistoryProducer
from producers.trading_controller import shared_producer
from tests.controllers import cli
from tests.deliveries import burst
from tests.documents import block
from tests.factories import a_signal, a_snapshot, an_old_archive, an_old_snapshot
from tests.faults.proxy import Proxy
from tests.rq_programs import somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")

_FIRST = datetime(2025, 10, 20, 17, 2, 46, 101234)
_OPTIONS = ("--timezone", "UTC", "--portfolio-id", "1", "--json")


def _snapshot(number: int, **overrides: Any) -> dict[str, Any]:
    values = {"balance": 9900.0 + number, "total_profit_loss": 0.1 * number, "trade_count": number}
    return an_old_snapshot(_FIRST + timedelta(seconds=number), **values | overrides)


def _archive(number: int, **overrides: Any) -> dict[str, Any]:
    return an_old_archive(_FIRST + timedelta(seconds=number), [a_signal(target_price=0.1 * number)]) | overrides


def _write(folder: Path, snapshots: list[Any] | None = None, archives: list[Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    if snapshots is not None:
        (folder / "portfolio_history.json").write_text(json.dumps(snapshots))
    if archives is not None:
        (folder / "signals_archive_2025-10.json").write_text(json.dumps(archives))
    return folder


def _histories(
    folder: Path, portfolio_id: int | None = 1, zone: tzinfo = UTC, nan_as_null: bool = False
) -> list[OldHistory]:
    return [
        OldHistory(source, zone=zone, portfolio_id=portfolio_id, nan_as_null=nan_as_null)
        for source in file_sources(folder)
    ]


def _import(folder: Path, **options: Any) -> list[ImportStatistics]:
    """Import in this process. The report is report.jsonl beside the folder."""
    histories = _histories(folder, **options)
    path = folder.parent / "report.jsonl"
    with Report(path) as report, EntriesInProgress(path) as in_progress:
        for history in histories:
            Importer(history, report, in_progress, say=print, advance=lambda: None).run()
    return [history.statistics for history in histories]


def _counts(statistics: list[ImportStatistics]) -> list[tuple[int, int, int, int]]:
    return [(of_file.read, of_file.stored, of_file.already_there, of_file.rejected) for of_file in statistics]


def _verify(folder: Path, **options: Any) -> list[Difference]:
    return list(Verification(_histories(folder, **options)).differences())


def _reported(folder: Path) -> list[tuple[str, int, str]]:
    lines = (folder.parent / "report.jsonl").read_text().splitlines()
    return [(line["file"], line["index"], line["reason"]) for line in map(json.loads, lines)]


def _execute(statement: str) -> None:
    with get_db() as db:
        db.execute(text(statement))


@pytest.fixture
def worker(redis: Redis, tmp_path: Path) -> Iterator[None]:
    with worker_process(tmp_path / "worker.log"):
        yield


@contextmanager
def _command(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-m", "consumers.cli", *arguments]
    settings = {**os.environ, **environment}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings) as process:
        try:
            yield process
        finally:
            process.kill()


def test_every_entry_becomes_a_row_and_a_second_run_inserts_nothing(tmp_path: Path) -> None:
    """`audit` finds no gap, `verify` finds no difference, and no file remains beside the report."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(1500)], [_archive(n) for n in range(30)])
    first = _import(folder)
    row_numbers = _used_row_numbers()
    second = _import(folder)

    assert _counts(first) == [(1500, 1500, 0, 0), (30, 30, 0, 0)]
    assert _counts(second) == [(1500, 0, 1500, 0), (30, 0, 30, 0)]
    assert _used_row_numbers() == row_numbers
    assert _verify(folder) == []
    assert {(one.source.split("/")[:2][1], one.stored, one.complete) for one in audit()} == {
        ("portfolio_history.json", 1500, True),
        ("signals_archive_2025-10.json", 30, True),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def _used_row_numbers() -> int:
    """Return the last used id of snapshots. An insert uses one even if the event already has a row."""
    with get_db() as db:
        return int(db.scalar(text("SELECT last_value FROM portfolio_history_id_seq")) or 0)


def test_invalid_entries_are_reported_and_recorded_and_the_others_are_imported(tmp_path: Path) -> None:
    """Not an event, the same instant with other amounts, the same entry twice, and a file that is cut off."""
    entries = [
        _snapshot(0),
        _snapshot(1, balance=None),
        _snapshot(0),
        _snapshot(0, balance=1),
        "nonsense",
        _snapshot(2),
    ]
    folder = _write(tmp_path / "old", entries)
    path = folder / "portfolio_history.json"
    path.write_text(path.read_text()[:-1] + ', {"date": "20')

    (of_file,) = _import(folder)
    (again,) = _import(folder)

    assert _counts([of_file, again]) == [(6, 2, 1, 3), (6, 0, 3, 3)]
    assert of_file.damage is not None
    assert of_file.damage.startswith("portfolio_history.json: is cut off (entry 6, byte ")
    reported = _reported(folder)
    assert sorted(reported) == sorted(_reported_lines(tmp_path / "report.jsonl.1"))
    assert [(index, reason.split(":")[0]) for _, index, reason in sorted(reported)][:1] == [(1, "balance")]
    assert {index for _, index, _ in reported} == {1, 3, 4}
    assert {(one.sequence, one.reason) for one in rejections()} == {(index, reason) for _, index, reason in reported}
    (account,) = audit()
    assert (account.stored, account.duplicate, account.rejected, account.missing) == (2, 1, 3, [])
    found = [(one.what, one.index) for one in _verify(folder)]
    assert sorted(found) == [("damaged", 6), ("differs", 3), ("unusable", 1), ("unusable", 4)]


@pytest.mark.parametrize("debug", [False, True])
def test_the_import_logs_the_outcome_of_each_entry_only_for_debugging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, debug: bool
) -> None:
    """Otherwise only the report and the statistics have them."""
    folder = _write(tmp_path / "old", [_snapshot(0), _snapshot(0, balance=1)])
    with caplog.at_level(logging.INFO, "rq.worker"), caplog.at_level(logging.NOTSET, batch.logger.name):
        assert cli(*(["--debug"] if debug else []), "import", str(folder), *_OPTIONS).exit_code == 1
    logged = {record.getMessage().split()[0] for record in caplog.records if record.name == batch.logger.name}
    assert logged == ({"stored", "rejected"} if debug else set())


def test_json_lines_and_an_array_in_an_object_are_imported(tmp_path: Path) -> None:
    """As an array in the file would be, with the same sequences: a second import of the array finds all rows."""
    snapshots, archives = [_snapshot(n) for n in range(3)], [_archive(n) for n in range(3)]
    folder = _write(tmp_path / "old", snapshots, archives)
    (folder / "portfolio_history.json").write_text("".join(json.dumps(one) + "\n" for one in snapshots))
    (folder / "signals_archive_2025-10.json").write_text(json.dumps({"signals": archives}))

    assert _counts(_import(folder)) == [(3, 3, 0, 0), (3, 3, 0, 0)]
    assert _verify(folder) == []
    _write(folder, snapshots, archives)
    assert _counts(_import(folder)) == [(3, 0, 3, 0), (3, 0, 3, 0)]


def test_import_and_verify_name_a_file_of_another_shape_and_read_the_others(tmp_path: Path) -> None:
    """Exit status 1, and the message with the command once; the dry run says the same."""
    folder = _write(tmp_path / "old", archives=[_archive(0)])
    path = folder / "portfolio_history.json"
    path.write_text(json.dumps([_snapshot(0)]), "utf-16")
    command = f"iconv -f UTF-16 -t UTF-8 {path} > {path}.new && mv {path}.new {path}"
    message = f"portfolio_history.json: is text in UTF-16, not UTF-8. Convert it: {command}"
    report = ("--report", str(tmp_path / "report.jsonl"))
    for arguments, counts in (
        (("import", "--dry-run", *report), "1 +0"),
        (("import", *report), "1 +1 +0"),
        (("verify",), "1 +1 +0"),
    ):
        with _command(arguments[0], str(folder), "--timezone", "UTC", *arguments[1:]) as process:
            output, errors = process.communicate(timeout=60)
        assert (process.returncode, output.count(message), errors) == (1, 1, "")
        assert re.search(rf"signals_archive_2025-10.json +{counts}", output), output


def test_the_message_names_files_with_nearly_the_right_name(tmp_path: Path) -> None:
    """For example a compressed file; other files are not named."""
    for name in ("portfolio_history.json.gz", "signals_archive_2025-10.jsonl", "other.json"):
        (tmp_path / name).touch()
    with pytest.raises(HistoryError) as caught:
        file_sources(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: has no portfolio_history.json and no signals_archive_*.json, but portfolio_history.json.gz and"
        " signals_archive_2025-10.jsonl: unpack or rename them"
    )


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", [("import",), ("import", "--dry-run"), ("verify",)])
def test_a_file_with_nearly_the_right_name_is_named_beside_valid_files(
    tmp_path: Path, command: tuple[str, ...], as_json: bool
) -> None:
    """It counts as damaged, so the exit status is 1. Files of other programs are ignored."""
    folder = _write(tmp_path / "old", [_snapshot(0)])
    names = {
        "portfolio_history.json.bak": "portfolio_history.json",
        "signals_archive_2025-10.json.gz": "signals_archive_YYYY-MM.json",
    }
    for name in (*names, "other.json.gz", "import-report.jsonl"):
        (folder / name).touch()
    options = ["--timezone", "UTC", "--portfolio-id", "1", *(["--json"] if as_json else [])]
    _import(folder)
    run = subprocess.run([sys.executable, "-m", "consumers.cli", command[0], str(folder), *command[1:], *options],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert (run.returncode, run.stderr) == (1, "")
    for name, right in names.items():
        line = f"{name}: is not read: unpack it, or rename it to {right}, or move it to another folder"
        assert run.stdout.count(line) == 1
    assert "other.json" not in run.stdout


def _reported_lines(path: Path) -> list[tuple[str, int, str]]:
    return [(line["file"], line["index"], line["reason"]) for line in map(json.loads, path.read_text().splitlines())]


def test_a_corrected_entry_is_stored_and_its_rejection_is_deleted(tmp_path: Path) -> None:
    """The other entries are already stored."""
    folder = _write(tmp_path / "old", [_snapshot(0), _snapshot(1, balance="?"), _snapshot(2)])
    _import(folder)
    assert [one.sequence for one in rejections()] == [1]
    _write(folder, [_snapshot(0), _snapshot(1), _snapshot(2)])

    assert _counts(_import(folder)) == [(3, 1, 2, 0)]
    assert list(rejections()) == []
    assert _verify(folder) == []


@pytest.mark.parametrize("other", [{"zone": timezone(timedelta(hours=5, minutes=30))}, {"portfolio_id": None}])
def test_another_zone_or_portfolio_does_not_store_entries_twice(tmp_path: Path, other: dict[str, Any]) -> None:
    """Every entry is rejected, and the reason names the row that it already has."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(3)], [_archive(0)])
    _import(folder)
    assert _counts(_import(folder, **other)) == [(3, 0, 0, 3), (1, 0, 0, 1)]
    with get_db() as db:
        tables = ("portfolio_history", "signal_archives")
        assert [db.scalar(text(f"SELECT count(*) FROM {table}")) for table in tables] == [3, 1]
    assert {reason.partition("row ")[0] for _, _, reason in _reported(folder)} == {"was already imported as "}
    assert _counts(_import(folder)) == [(3, 0, 3, 0), (1, 0, 1, 0)]


def test_an_inserted_entry_is_stored_although_later_numbers_change(tmp_path: Path) -> None:
    """The entries after it are found by their event ids."""
    entries = [_snapshot(n) for n in (0, 1, 3, 4)]
    _import(_write(tmp_path / "old", entries))
    entries.insert(2, _snapshot(2))
    assert _counts(_import(_write(tmp_path / "old", entries))) == [(5, 1, 4, 0)]
    assert _verify(tmp_path / "old") == []


def test_verify_compares_derived_columns_too(tmp_path: Path) -> None:
    """A row that was moved to another portfolio or month keeps its event id."""
    folder = _write(tmp_path / "old", [_snapshot(0)], [_archive(0)])
    _import(folder)
    _execute("UPDATE portfolio_history SET portfolio_id = 2")
    _execute("UPDATE signal_archives SET archive_month = '2020-01', portfolio_id = NULL")
    found = [(one.what, [field.field for field in one.fields]) for one in _verify(folder)]
    assert found == [("differs", ["portfolio_id"]), ("differs", ["portfolio_id", "archive_month"])]


def test_a_report_that_cannot_be_written_is_an_error_before_the_import(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="the report cannot be written"):
        Report(tmp_path / "nowhere" / "report.jsonl")


def test_an_earlier_report_is_renamed_but_a_pipe_is_not(tmp_path: Path) -> None:
    """A program may read from a pipe, and /dev/null must keep its name."""
    pipe, earlier = tmp_path / "pipe", tmp_path / "report.jsonl"
    os.mkfifo(pipe)
    earlier.write_text("earlier")
    for path in (pipe, earlier):
        with Report(path):
            pass
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "report.jsonl.1"]


def test_a_discarded_rejection_stays_discarded(redis: Redis, tmp_path: Path) -> None:
    """The entry is reported, but neither tried again nor recorded as rejected again."""
    folder = _write(tmp_path / "old", [_snapshot(0), _snapshot(0, balance=1), _snapshot(1, balance="?")])
    _import(folder)
    discard(rejections(), redis, "history", "known")

    assert _counts(_import(folder)) == [(3, 0, 1, 2)]
    assert list(rejections()) == []


def test_only_missing_entries_are_inserted(tmp_path: Path) -> None:
    """Deleted rows, and entries that were appended to the file."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(20)])
    _import(folder)
    _execute("DELETE FROM portfolio_history WHERE sequence IN (3, 7)")
    _write(folder, [_snapshot(n) for n in range(22)])

    assert _counts(_import(folder)) == [(22, 4, 18, 0)]
    assert _verify(folder) == []


def test_an_entry_that_a_producer_already_recorded_is_a_duplicate(redis: Redis, worker: None, tmp_path: Path) -> None:
    """The event has one row, and the entry is recorded once as a duplicate."""
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        moment = _FIRST.replace(tzinfo=UTC)
        values = {name: value for name, value in _snapshot(0).items() if name not in ("date", "timestamp")}
        payload = a_snapshot(timestamp=moment, snapshot_date=moment.date(), **values)
        producer.record(payload).wait(20)
    folder = _write(tmp_path / "old", [_snapshot(0), _snapshot(1)])

    assert _counts(_import(folder)) == [(2, 1, 1, 0)]
    assert _counts(_import(folder)) == [(2, 0, 2, 0)]
    imported = next(one for one in audit() if one.source.startswith("import/"))
    assert (imported.stored, imported.duplicate, imported.missing) == (1, 1, [])
    assert _verify(folder) == []


def test_verify_finds_differences_in_both_directions(tmp_path: Path) -> None:
    """Changed amounts and signals, a missing row and an extra row, but not rows of other portfolios or times."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(5)], [_archive(n) for n in range(3)])
    _import(folder)
    _execute("UPDATE portfolio_history SET balance = balance + 0.00000001, trade_count = 9 WHERE sequence = 1")
    _execute("DELETE FROM portfolio_history WHERE sequence = 2")
    _execute(
        "UPDATE signal_archives SET signals_data = jsonb_build_array(jsonb_set(signals_data -> 0, '{amount}', '121')"
        " - 'reason' || '{\"risk\": null}') WHERE sequence = 1"
    )
    for portfolio, seconds in ((1, 2), (2, 2), (1, 200)):
        _execute(
            "INSERT INTO portfolio_history (event_id, source, portfolio_id, snapshot_date, timestamp, balance,"
            " total_invested, total_profit_loss, total_value, open_positions, trade_count) VALUES (gen_random_uuid(),"
            f" 'direct', {portfolio}, '2025-10-20', '2025-10-20 17:02:46Z'::timestamptz + interval '{seconds} s',"
            " 1, 1, 1, 1, 1, 1)"
        )

    found = _verify(folder)

    assert [(one.what, one.file, one.index) for one in found] == [
        ("missing", "portfolio_history.json", 2),
        ("differs", "portfolio_history.json", 1),
        ("differs", "signals_archive_2025-10.json", 1),
        ("unexpected", None, None),
    ]
    assert sorted(found[1].fields) == [
        ("balance", "9901.00000000", "9901.00000001"),
        ("trade_count", "1", "9"),
    ]
    assert found[2].fields == [
        ("signals.0.amount", "120", "121"),
        ("signals.0.reason", "Two reports.", "absent"),
        ("signals.0.risk", "absent", "None"),
    ]
    assert "of portfolio 1, recorded by direct, has no entry" in found[3].reason


def test_verify_finds_every_row_without_an_entry_however_many_there_are(tmp_path: Path) -> None:
    """It reads 20,000 of them at once."""
    folder = _write(tmp_path / "old", [_snapshot(0), _snapshot(1)])
    _import(folder)
    with get_db() as db:
        db.execute(
            text(
                "INSERT INTO portfolio_history (event_id, source, portfolio_id, snapshot_date, timestamp, balance,"
                " total_invested, total_profit_loss, total_value, open_positions, trade_count)"
                " SELECT gen_random_uuid(), 'direct', 1, '2025-10-20', at, 1, 1, 1, 1, 1, 1 FROM"
                " (SELECT min(timestamp) + interval '0.1 s' AS at FROM portfolio_history) AS one,"
                " generate_series(1, 20001)"
            )
        )
    found = _verify(folder)
    assert {one.what for one in found} == {"unexpected"}
    assert len({one.row_id for one in found}) == len(found) == 20_001


def test_a_set_of_row_ids_contains_the_ids_that_were_added() -> None:
    """Also ids that are far apart."""
    ids = RowIds()
    for row_id in (0, 7, 65_535, 65_536, 2**62):
        ids.add(row_id)
    assert [row_id in ids for row_id in (0, 1, 7, 65_535, 65_536, 65_537, 2**62)] == [
        True,
        False,
        True,
        True,
        True,
        False,
        True,
    ]


def _rows() -> int:
    with get_db() as db:
        return int(db.scalar(text("SELECT count(*) FROM portfolio_history")) or 0)


@contextmanager
def _database_behind(proxy_folder: Path) -> Iterator[tuple[Proxy, str]]:
    """Run a proxy in front of the database. Yield it and the URL that goes through it."""
    url = make_url(os.environ["DATABASE_URL"])
    name = f".s.PGSQL.{url.port or 5432}"
    proxy = Proxy(proxy_folder / name, Path(str(url.query["host"])) / name)
    with proxy.running():
        yield proxy, url.update_query_dict({"host": str(proxy_folder)}).render_as_string(hide_password=False)


def test_the_import_waits_during_an_outage_and_prints_it_once(tmp_path: Path) -> None:
    """Entries in progress at the start of the outage are neither lost nor stored twice."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(4000)])
    with (
        TemporaryDirectory(dir="/tmp") as short,
        _database_behind(Path(short)) as (proxy, url),
        _command("import", str(folder), *_OPTIONS, "--rate", "2000", DATABASE_URL=url) as running,
    ):
        until(lambda: _rows() > 500)
        proxy.set_mode("refuse")
        proxy.cut()
        assert running.stderr is not None
        printed = [running.stderr.readline()]
        proxy.set_mode("pass")
        output, rest = running.communicate(timeout=60)
    assert [line.split(":")[0] for line in [*printed, *rest.splitlines()]] == [
        "waiting for the database",
        "the database is available again, the import continues",
    ]
    (of_file,) = json.loads(output)["files"]
    assert (of_file["read"], of_file["rejected"]) == (4000, 0)
    assert _verify(folder) == []
    assert all(one.complete for one in audit())


def test_a_stop_signal_ends_an_import_that_waits_for_the_database(tmp_path: Path) -> None:
    """At once, and without a traceback."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(4000)])
    with (
        TemporaryDirectory(dir="/tmp") as short,
        _database_behind(Path(short)) as (proxy, url),
        _command("import", str(folder), *_OPTIONS, "--rate", "2000", DATABASE_URL=url) as running,
    ):
        until(lambda: _rows() > 500)
        proxy.set_mode("refuse")
        proxy.cut()
        assert running.stderr is not None
        assert running.stderr.readline().startswith("waiting for the database")
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=20)
    assert running.returncode == 143
    assert re.fullmatch(r"stopped after [\d,]+ entries; run the same command again to continue\n", errors)


def test_an_import_needs_no_redis(tmp_path: Path) -> None:
    """REDIS_URL may be unset, or Redis may be away. It needs no worker either."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(3)])
    for number, settings in enumerate(({}, {"REDIS_URL": "redis://127.0.0.1:1"})):
        with _command("import", str(folder), *_OPTIONS, **settings) as running:
            output, errors = running.communicate(timeout=30)
        assert (running.returncode, errors) == (0, "")
        assert json.loads(output)["files"][0]["already_there"] == 3 * number


def test_a_second_run_completes_an_import_that_was_killed(tmp_path: Path) -> None:
    """No entry is rejected, `verify` finds no difference, and `audit` finds no gap."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(6000)], [_archive(n) for n in range(100)])
    with _command("import", str(folder), *_OPTIONS) as killed:
        until(lambda: _rows() > 300, 40)
        killed.kill()
        killed.communicate(timeout=20)
    assert _rows() < 6000
    with _command("import", str(folder), *_OPTIONS) as second:
        output, errors = second.communicate(timeout=90)
    files = json.loads(output)["files"]
    assert sum(one["stored"] + one["already_there"] for one in files) == 6100, errors
    assert errors == ""
    with _command("verify", str(folder), *_OPTIONS) as verify:
        assert json.loads(verify.communicate(timeout=60)[0])["differences"] == []
    assert verify.returncode == 0
    assert all(one.complete for one in audit())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_prints_the_number_of_decided_entries(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """On stderr, without a traceback. No entry counts as a cause of a crash, and a second run completes the import."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(500)])
    with _command("import", str(folder), *_OPTIONS, "--rate", "20") as running:
        until(lambda: _rows() > 0)
        running.send_signal(number)
        _, errors = running.communicate(timeout=20)
    decided = _rows()
    assert running.returncode == status
    message = re.fullmatch(r"stopped after (\d+) entries; run the same command again to continue\n", errors)
    assert message is not None
    assert 0 <= int(message[1]) <= decided  # the signal may come between the commit of a batch and its count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
    assert _counts(_import(folder)) == [(500, 500 - decided, decided, 0)]


def test_the_rate_limits_the_inserted_events_per_second(tmp_path: Path) -> None:
    """From the first second on. Entries that are already stored do not count."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(60)])
    started = time.monotonic()
    with _command("import", str(folder), *_OPTIONS, "--rate", "20") as running:
        until(lambda: _rows() > 0)
        assert _rows() <= 20
        running.communicate(timeout=30)
    assert (_rows(), time.monotonic() - started > 2.9) == (60, True)
    started = time.monotonic()
    with _command("import", str(folder), *_OPTIONS, "--rate", "1") as again:
        again.communicate(timeout=30)
    assert (again.returncode, time.monotonic() - started < 20) == (0, True)


def test_a_deadlock_loses_no_entry(tmp_path: Path) -> None:
    """PostgreSQL aborts the import's transaction, and every entry is stored nevertheless."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(200)])
    (history,) = _histories(folder)
    (chunk,) = history.chunks()
    first, *_, last = sorted((history.event(entry) for entry in chunk), key=lambda event: event.id)
    with ThreadPoolExecutor() as pool, engine().connect() as other:
        insert_events(other, [last])
        importing = pool.submit(_import, folder)
        until(somebody_waits_for_a_lock)
        deadlocks = _deadlocks()
        insert_events(other, [first])  # the import has inserted it: PostgreSQL must abort one of the two transactions
        other.rollback()
        assert _counts(importing.result(30)) == [(200, 200, 0, 0)]
    until(lambda: _deadlocks() == deadlocks + 1)
    assert _verify(folder) == []


def _deadlocks() -> int:
    with get_db() as db:
        return int(db.scalar(text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")) or 0)


def test_several_imports_of_one_folder_at_once_store_every_entry_once(tmp_path: Path, worker: None) -> None:
    """Meanwhile a worker stores the same events."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(1500)])
    commands = [("import", str(folder), *_OPTIONS, "--report", str(tmp_path / f"{n}.jsonl")) for n in range(2)]
    (history,) = _histories(folder)
    events = [history.event(entry) for chunk in history.chunks() for entry in chunk]
    with HistoryProducer(outbox=tmp_path / "outbox.db") as producer, ExitStack() as stack:
        running = [stack.enter_context(_command(*command)) for command in commands]
        receipts = [producer.record(event.data) for event in events[::-3]]
        ended = [process.communicate(timeout=60) for process in running]
        for receipt in receipts:
            receipt.wait(30)
    assert [(errors, json.loads(output)["files"][0]["rejected"]) for output, errors in ended] == [("", 0), ("", 0)]
    assert _rows() == 1500
    assert _verify(folder) == []
    assert all(one.complete for one in audit())


def test_a_locked_entry_does_not_delay_the_others(tmp_path: Path) -> None:
    """It is stored after the lock is released."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(1200)])
    (history,) = _histories(folder)
    event = history.event(next(history.chunks())[7])
    with engine().connect() as other:
        insert_events(other, [event])
        other.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        with _command("import", str(folder), *_OPTIONS) as running:
            until(lambda: _rows() == 1199, 40)
            other.rollback()
            output, errors = running.communicate(timeout=60)
    assert json.loads(output)["files"][0]["stored"] == 1200, errors
    assert _verify(folder) == []


_CRASHES = """
import os, sys
from consumers import cli
from consumers.legacy import old_history
from consumers.worker import batch

def crashing(function):
    def called(given, *more, **named):
        if "7.7777" in str((given, *more)):
            os._exit(9)
        return function(given, *more, **named)
    return called

if sys.argv.pop(1) == "insert":
    batch.insert_events = crashing(batch.insert_events)
else:
    old_history.snapshot_from = crashing(old_history.snapshot_from)
cli.main()
"""


@pytest.mark.parametrize(("place", "crashes"), [("insert", 4), ("convert", 5)])
def test_the_next_runs_isolate_an_entry_that_crashes_the_process(
    redis: Redis, tmp_path: Path, place: str, crashes: int
) -> None:
    """It is rejected as poison, if necessary unread. The others are stored, and later runs do not crash."""
    folder = _write(tmp_path / "old", [_snapshot(n, balance=7.7777 if n == 1234 else n) for n in range(1500)])
    line = [sys.executable, "-c", _CRASHES, place, "import", str(folder), *_OPTIONS]
    runs = [subprocess.run(line, capture_output=True, text=True, timeout=60, check=False) for _ in range(crashes + 2)]

    assert [run.returncode for run in runs] == [9] * crashes + [1, 1]
    for run in runs[crashes:]:
        assert run.stderr == ""
        assert json.loads(run.stdout)["files"][0]["rejected"] == 1
    assert _rows() == 1499
    (rejection,) = rejections()
    assert (rejection.sequence, rejection.reason.partition(":")[0]) == (1234, "poison event")
    assert all(one.complete for one in audit())
    assert not list(tmp_path.glob("*.in-progress"))

    if place == "insert":  # its event is known and can be requeued after the defect is fixed
        requeue(rejections(), redis, "history")
        burst(redis)
        assert list(rejections()) == []
    else:  # corrected in the file
        _write(folder, [_snapshot(n, balance=n) for n in range(1500)])
    (of_file,) = _import(folder)
    assert (of_file.stored + of_file.already_there, of_file.rejected) == (1500, 0)


def test_a_defect_of_one_entry_is_rejected_as_poison_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried as often as by a worker."""

    def defective(db: Connection, events: Sequence[Event]) -> Any:
        if "7.7777" in str(events):
            raise RuntimeError("a defect")
        return insert_events(db, events)

    monkeypatch.setattr(batch, "insert_events", defective)
    folder = _write(tmp_path / "old", [_snapshot(n, balance=7.7777 if n == 3 else n) for n in range(8)])
    assert _counts(_import(folder)) == [(8, 7, 0, 1)]
    (rejection,) = rejections()
    assert rejection.reason.endswith("last error: RuntimeError: a defect")
    monkeypatch.undo()
    assert _counts(_import(folder)) == [(8, 0, 7, 1)]


def test_a_rejection_of_an_import_can_be_requeued(redis: Redis, tmp_path: Path) -> None:
    """After the conflicting row is deleted, a worker stores the event."""
    folder = _write(tmp_path / "old", [_snapshot(0), _snapshot(0, balance=1)])
    _import(folder)
    _execute("DELETE FROM portfolio_history")
    assert requeue(rejections(), redis, "history") == 1
    burst(redis)
    assert (_rows(), list(rejections())) == (1, [])


def test_an_import_shows_its_progress_on_a_terminal_only(tmp_path: Path) -> None:
    """On standard error, as a part of the bytes of all files. The result on standard output is the same."""
    line = [sys.executable, "-m", "consumers.cli", "import"]
    line += [str(_write(tmp_path / "old", [_snapshot(n) for n in range(600)])), "--timezone", "Europe/Berlin"]
    terminal, other = pty.openpty()
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=other, text=True) as process:
        os.close(other)
        shown = b""
        with suppress(OSError):  # EIO: the other side is closed
            while piece := os.read(terminal, 4096):
                shown += piece
        printed, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert (process.returncode, b"100%" in shown) == (0, True), shown
    again = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    assert "100%" not in again.stderr
    assert printed.splitlines()[0] == again.stdout.splitlines()[0]


def test_the_commands_print_tables_and_json_and_return_an_exit_status(tmp_path: Path) -> None:
    """1 if an entry is rejected or differs, 2 for wrong usage. A dry run needs no server."""
    entries = [_snapshot(0), _snapshot(1, balance="?"), _snapshot(0, balance=1)]
    folder = _write(tmp_path / "old", entries, [_archive(0, extra=1)])
    common = (str(folder), "--timezone", "Europe/Berlin")

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        line = [sys.executable, "-m", "consumers.cli", *arguments]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False
        )
        return done.returncode, done.stdout, done.stderr

    dry = run("import", *common, "--dry-run", "--report", "dry.jsonl", DATABASE_URL="", REDIS_URL="redis://127.0.0.1:1")
    real = run("import", *common)
    again = run("import", *common, "--json")
    checked = run("verify", *common)

    assert dry[0] == 1
    assert "signals_archive_2025-10.json: unknown key 'extra' was left out (1 times)" in dry[1]
    (line,) = Path("dry.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "file": "portfolio_history.json",
        "index": 1,
        "reason": "balance: is text that is not a number",
        "entry": _snapshot(1, balance="?"),
    }
    assert real[0] == 1
    assert real[1].splitlines()[1].split() == ["portfolio_history.json", "3", "1", "0", "2", "none"]
    assert "Times without a zone were read in Europe/Berlin." in real[1]
    assert real[2] == ""
    facts = json.loads(again[1])
    assert [(one["stored"], one["already_there"]) for one in facts["files"]] == [(0, 1), (0, 1)]
    assert facts["report"] == "import-report.jsonl"
    assert (Path("import-report.jsonl").exists(), Path("import-report.jsonl.1").exists()) == (True, True)
    assert checked[0] == 1
    assert checked[1].startswith("unusable: portfolio_history.json entry 1: balance: is text that is not a number\n")
    assert run("import", str(tmp_path / "nowhere"))[0] == 1
    assert run("import", *common[:1], "--timezone", "Berlin")[0] == 2


_NAN = float("nan")


def _with_nan(folder: Path) -> Path:
    """Write both files with NaN in the first, a middle and the last entry."""
    broken = [_snapshot(0, balance=_NAN), _snapshot(2, trade_count=-float("inf")), _snapshot(4, extra={"a": [_NAN]})]
    archives = [
        _archive(0, signals=[a_signal(), a_signal(deep=[1, {"price": _NAN}])], signals_count=2),
        _archive(1),
        _archive(2, signals_count=_NAN),
        _archive(3),
        _archive(4, signals=[a_signal(target_price=float("inf"), amount=_NAN)]),
    ]
    return _write(folder, [broken[0], _snapshot(1), broken[1], _snapshot(3), broken[2]], archives)


_NAN_REJECTIONS = [
    ("portfolio_history.json", 0, "balance: must be finite, not NaN or Infinity"),
    ("portfolio_history.json", 2, "trade_count: must be finite, not NaN or Infinity"),
    ("portfolio_history.json", 4, "extra.a.0: must be finite, not NaN or Infinity"),
    (
        "signals_archive_2025-10.json",
        0,
        "signals.1.deep.1.price: must be finite and within ±1.8e308 (--nan-as-null reads NaN in signals as null)",
    ),
    ("signals_archive_2025-10.json", 2, "signals_count: must be finite, not NaN or Infinity"),
    (
        "signals_archive_2025-10.json",
        4,
        "signals.0.target_price: must be finite and within ±1.8e308 (--nan-as-null reads NaN in signals as null)",
    ),
]


def test_an_entry_with_nan_is_rejected_and_the_other_entries_are_read(tmp_path: Path) -> None:
    """The import records it. The import, a dry run and `verify` name file, entry and field."""
    folder = _with_nan(tmp_path / "old")
    with Report(tmp_path / "dry.jsonl") as report:
        for history in _histories(folder):
            dry_run(history, report, lambda: None)
    assert _reported_lines(tmp_path / "dry.jsonl") == _NAN_REJECTIONS

    assert _counts(_import(folder)) == [(5, 2, 0, 3), (5, 2, 0, 3)]
    assert _reported(folder) == _NAN_REJECTIONS
    assert _counts(_import(folder)) == [(5, 0, 2, 3), (5, 0, 2, 3)]
    assert [(one.what, one.file, one.index, one.reason) for one in _verify(folder)] == [
        ("unusable", *rejection) for rejection in _NAN_REJECTIONS
    ]
    assert sorted(one.reason or "" for one in rejections()) == sorted(reason for _, _, reason in _NAN_REJECTIONS)
    assert [(one.stored, one.rejected, one.complete) for one in audit()] == [(2, 3, True)] * 2


def test_with_nan_as_null_nan_in_signals_is_stored_as_null_and_counted(tmp_path: Path) -> None:
    """NaN in amounts is rejected. An earlier rejection is deleted, and `verify` needs the option too."""
    folder = _with_nan(tmp_path / "old")
    _import(folder)

    statistics = _import(folder, nan_as_null=True)

    assert _counts(statistics) == [(5, 0, 2, 3), (5, 2, 2, 1)]
    note = "NaN or Infinity in signals was read as null; verify needs --nan-as-null too"
    assert [dict(of_file.notes) for of_file in statistics] == [{}, {note: 3}]
    assert _reported(folder) == [one for one in _NAN_REJECTIONS if "--nan-as-null" not in one[2]]
    assert sorted(one.reason or "" for one in rejections()) == sorted(reason for _, _, reason in _reported(folder))
    with get_db() as db:
        rows = db.execute(text("SELECT signals_data FROM signal_archives ORDER BY archived_at")).scalars().all()
    assert [row[-1].get("deep") for row in rows] == [[1, {"price": None}], None, None, None]
    assert (rows[3][0]["target_price"], rows[3][0]["amount"]) == (None, None)
    assert {one.what for one in _verify(folder, nan_as_null=True)} == {"unusable"}
    assert [one.what for one in _verify(folder)][-2:] == ["unexpected", "unexpected"]


def test_an_import_without_nan_as_null_keeps_rows_of_an_import_with_it(tmp_path: Path) -> None:
    """The report names the row of the entry, and no rejection is recorded."""
    folder = _with_nan(tmp_path / "old")
    _import(folder, nan_as_null=True)
    before = [replace(one, last_at=None) for one in audit()]

    assert _counts(_import(folder)) == [(5, 0, 2, 3), (5, 0, 2, 3)]

    reasons = [reason for file, index, reason in _reported(folder) if file.startswith("signals") and index != 2]
    rows = [int(reason.rpartition(" ")[2]) for reason in reasons]
    assert [reason.partition("; ")[2] for reason in reasons] == [
        f"an earlier import stored this sequence as row {row}" for row in rows
    ]
    with get_db() as db:
        stored = db.execute(text("SELECT id FROM signal_archives WHERE sequence IN (0, 4) ORDER BY sequence")).scalars()
        assert list(stored) == rows
    # The rejections were recorded again, which is the newest activity of their source.
    assert [replace(one, last_at=None) for one in audit()] == before
    assert _counts(_import(folder, nan_as_null=True)) == [(5, 0, 2, 3), (5, 0, 4, 1)]


def test_a_killed_import_with_nan_as_null_continues_without_duplicates(tmp_path: Path) -> None:
    """With the option in the next run, and without it."""
    archives = [_archive(n, signals=[a_signal(price=_NAN if n % 2 == 0 else n)]) for n in range(20)]
    folder = _write(tmp_path / "old", archives=archives)
    with _command("import", str(folder), *_OPTIONS, "--nan-as-null", "--rate", "10") as killed:
        until(lambda: _archives() > 0)
        killed.kill()
    stored = _archives()
    assert stored < 20
    (without,) = _import(folder)
    assert (without.stored + without.already_there, without.rejected) == (10, 10)
    (of_file,) = _import(folder, nan_as_null=True)
    assert (of_file.stored + of_file.already_there, of_file.rejected) == (20, 0)
    assert list(rejections()) == []
    assert [(one.stored, one.rejected, one.complete) for one in audit()] == [(20, 0, True)]
    assert _verify(folder, nan_as_null=True) == []


def _archives() -> int:
    with get_db() as db:
        return int(db.scalar(text("SELECT count(*) FROM signal_archives")) or 0)


def test_the_commands_name_the_entry_with_nan_and_accept_the_option(tmp_path: Path) -> None:
    """Also if the first entry has it. A dry run needs no server."""
    folder = _write(tmp_path / "old", [_snapshot(0, balance=_NAN)], [_archive(0, signals=[a_signal(price=_NAN)])])
    common = (str(folder), "--timezone", "UTC")

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        line = [sys.executable, "-m", "consumers.cli", *arguments]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False
        )
        assert done.stderr == ""
        return done.returncode, done.stdout

    away = {"DATABASE_URL": "", "REDIS_URL": "redis://127.0.0.1:1"}
    dry = run("import", *common, "--dry-run", "--report", "dry.jsonl", **away)
    real = run("import", *common)
    checked = run("verify", *common)
    with_option = run("import", *common, "--nan-as-null")
    agreed = run("verify", *common, "--nan-as-null")

    expected = [("portfolio_history.json", 0, "balance"), ("signals_archive_2025-10.json", 0, "signals.0.price")]
    for report in ("dry.jsonl", "import-report.jsonl.1"):
        found = [(file, index, reason.partition(":")[0]) for file, index, reason in _reported_lines(Path(report))]
        assert found == expected
    assert [code for code, _ in (dry, real, checked, with_option, agreed)] == [1] * 5
    assert [line.rpartition(": must")[0] for line in checked[1].splitlines()[:2]] == [
        f"unusable: {file} entry {index}: {field}" for file, index, field in expected
    ]
    note = "NaN or Infinity in signals was read as null; verify needs --nan-as-null too (1 times)"
    assert f"signals_archive_2025-10.json: {note}" in with_option[1]
    assert [
        (one["file"], one["index"]) for one in map(json.loads, Path("import-report.jsonl").read_text().splitlines())
    ] == [("portfolio_history.json", 0)]
    assert agreed[1].startswith("unusable: portfolio_history.json entry 0: balance: must be finite")
    assert agreed[1].count("unusable") == 1
    assert "NaN and Infinity in signals were read as null." in agreed[1]


def test_the_commands_of_the_document_import_and_verify_old_files(tmp_path: Path) -> None:
    """`verify` finds no difference."""
    (tmp_path / "data").mkdir()
    _write(tmp_path / "data" / "history", [_snapshot(n) for n in range(3)], [_archive(0)])
    for line in block("consumers/legacy/README.md", "import").splitlines():
        program, *arguments = line.split()
        assert program == "trading-history"
        with _command(*arguments) as running:
            _, errors = running.communicate(timeout=60)
        assert (running.returncode, errors) == (0, "")
    assert (_rows(), _archives()) == (3, 1)


def test_the_code_of_the_document_records_a_snapshot_and_an_archive(redis: Redis, tmp_path: Path) -> None:
    """Both have the portfolio, total_value follows the old controller's formula, and a repeated cycle adds no row."""
    signals = tmp_path / "data" / "trades" / "current_signals.json"
    signals.parent.mkdir(parents=True)
    signals.write_text(json.dumps([a_signal()], default=str))
    namespace: dict[str, Any] = {"portfolio": {"balance": 9900, "total_invested": 100, "total_profit_loss": 7}}
    code = block("consumers/legacy/README.md", "switch")
    exec(code, namespace)
    again = code[code.index("\ncreate_daily_portfolio_snapshot") :]  # the same cycle runs again
    exec(again, namespace)
    shared_producer().close()
    burst(redis)
    with get_db() as db:
        snapshots = db.execute(text("SELECT portfolio_id, total_value FROM portfolio_history")).all()
        archives = db.execute(text("SELECT portfolio_id, signals_count FROM signal_archives")).all()
    assert ([tuple(row) for row in snapshots], [tuple(row) for row in archives]) == ([(1, 9907)], [(1, 1)])


def test_an_import_into_a_read_only_database_says_so(database_url: str, tmp_path: Path) -> None:
    folder = _write(tmp_path / "old", [_snapshot(1)])
    with get_db() as db:
        db.exec_driver_sql(f"ALTER DATABASE {make_url(database_url).database} SET default_transaction_read_only = on")
    program = [sys.executable, "-m", "consumers.cli", "import", str(folder), *_OPTIONS]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.kill()
    assert "the database is read-only: turn default_transaction_read_only off for this role" in line

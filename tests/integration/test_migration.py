"""Import and verify on real servers: every entry a row or a reported rejection, whoever dies in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.embedded.child_processes import worker_process
from consumers.legacy import flight as flight_module
from consumers.legacy.comparison import RowIds
from consumers.legacy.flight import FEWEST_JOBS, Flight, Window
from consumers.legacy.import_report import Report
from consumers.legacy.importer import Importer, look
from consumers.legacy.old_history import OldHistory, Tally, file_origins
from consumers.legacy.verification import Difference, Verification
from consumers.ops.audit import audit
from consumers.ops.failed import discard, rejections
from producers.errors import HistoryError
from producers.history_producer import HistoryProducer
from producers.redis_keys import acknowledgement_key, lease_key
from tests.factories import a_signal, a_snapshot
from tests.faults.proxy import Proxy
from tests.rq_programs import until

pytestmark = pytest.mark.usefixtures("database_url")

_FIRST = datetime(2025, 10, 20, 17, 2, 46, 101234)
_QUEUE = "rq:queue:history"


def _snapshot(number: int, **overrides: Any) -> dict[str, Any]:
    moment = _FIRST + timedelta(seconds=number)
    entry = {
        "date": moment.date().isoformat(),
        "timestamp": moment.isoformat(),
        "balance": 9900.0 + number,
        "total_invested": 100.0,
        "total_profit_loss": 0.1 * number,
        "total_value": 9987.350000000001,
        "open_positions": 1,
        "trade_count": number,
    }
    return entry | overrides


def _archive(number: int, **overrides: Any) -> dict[str, Any]:
    signals = [a_signal(target_price=0.1 * number)]
    entry = {"archived_at": (_FIRST + timedelta(seconds=number)).isoformat(), "signals_count": 1, "signals": signals}
    return entry | overrides


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
        OldHistory(origin, zone=zone, portfolio_id=portfolio_id, nan_as_null=nan_as_null)
        for origin in file_origins(folder)
    ]


def _import(redis: Redis, folder: Path, said: list[str] | None = None, **about: Any) -> list[Tally]:
    """Import in this process; the report is report.jsonl beside the folder."""
    histories = _histories(folder, **about)
    with Report(folder.parent / "report.jsonl") as report:
        say = (said if said is not None else []).append
        importer = Importer(redis, "history", report, say=say, advance=lambda: None)
        for history in histories:
            importer.run(history)
    return [history.tally for history in histories]


def _counts(tallies: list[Tally]) -> list[tuple[int, int, int, int]]:
    return [(tally.read, tally.stored, tally.already_there, tally.rejected) for tally in tallies]


def _verify(folder: Path, **about: Any) -> list[Difference]:
    return list(Verification(_histories(folder, **about)).differences())


def _reported(folder: Path) -> list[tuple[str, int, str]]:
    lines = (folder.parent / "report.jsonl").read_text().splitlines()
    return [(line["file"], line["index"], line["reason"]) for line in map(json.loads, lines)]


def _execute(statement: str) -> None:
    with get_db() as db:
        db.execute(text(statement))


@pytest.fixture
def worker(redis: Redis, database_url: str, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with worker_process(tmp_path / "worker.log") as process:
        yield process


@contextmanager
def _command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-m", "consumers.cli", *arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.usefixtures("worker")
def test_every_entry_becomes_a_row_and_a_second_run_sends_nothing(redis: Redis, tmp_path: Path) -> None:
    """Snapshots and archives; the audit finds no gap, verify no difference, and Redis keeps nothing of it."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(1500)], [_archive(n) for n in range(30)])
    first = _import(redis, folder)
    enqueued = redis.info("commandstats")
    second = _import(redis, folder)

    assert _counts(first) == [(1500, 1500, 0, 0), (30, 30, 0, 0)]
    assert _counts(second) == [(1500, 0, 1500, 0), (30, 0, 30, 0)]
    assert redis.info("commandstats").get("cmdstat_rpush") == enqueued.get("cmdstat_rpush")
    assert _verify(folder) == []
    assert {(one.source.split("/")[:2][1], one.stored, one.complete) for one in audit()} == {
        ("portfolio_history.json", 1500, True),
        ("signals_archive_2025-10.json", 30, True),
    }
    assert not (tmp_path / "report.jsonl").exists()
    assert redis.keys("history:ack:*") == []


@pytest.mark.usefixtures("worker")
def test_what_cannot_be_taken_is_reported_and_recorded_and_the_rest_goes_on(redis: Redis, tmp_path: Path) -> None:
    """No event at all, the same instant with other amounts, the same entry twice, a file that is cut off."""
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

    (tally,) = _import(redis, folder)
    (again,) = _import(redis, folder)

    assert _counts([tally, again]) == [(6, 2, 1, 3), (6, 0, 3, 3)]
    assert tally.damage is not None
    assert tally.damage.startswith("portfolio_history.json: is cut off (entry 6, byte ")
    reported = _reported(folder)
    assert sorted(reported) == sorted(_reported_lines(tmp_path / "report.jsonl.1"))
    assert [(index, reason.split(":")[0]) for _, index, reason in sorted(reported)][:1] == [(1, "balance")]
    assert {index for _, index, _ in reported} == {1, 3, 4}
    assert {(one.sequence, one.reason) for one in rejections()} == {(index, reason) for _, index, reason in reported}
    (account,) = audit()
    assert (account.stored, account.duplicate, account.rejected, account.missing) == (2, 1, 3, [])
    found = [(one.what, one.index) for one in _verify(folder)]
    assert sorted(found) == [("damaged", 6), ("differs", 3), ("unusable", 1), ("unusable", 4)]


def _reported_lines(path: Path) -> list[tuple[str, int, str]]:
    return [(line["file"], line["index"], line["reason"]) for line in map(json.loads, path.read_text().splitlines())]


@pytest.mark.usefixtures("worker")
def test_a_repaired_entry_comes_in_and_its_rejection_gives_way(redis: Redis, tmp_path: Path) -> None:
    """Everything else is there already; nothing is rejected any more."""
    folder = _write(tmp_path / "old", [_snapshot(0), _snapshot(1, balance="?"), _snapshot(2)])
    _import(redis, folder)
    assert [one.sequence for one in rejections()] == [1]
    _write(folder, [_snapshot(0), _snapshot(1), _snapshot(2)])

    assert _counts(_import(redis, folder)) == [(3, 1, 2, 0)]
    assert list(rejections()) == []
    assert _verify(folder) == []


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("other", [{"zone": timezone(timedelta(hours=5, minutes=30))}, {"portfolio_id": None}])
def test_with_another_zone_or_portfolio_nothing_is_stored_twice(
    redis: Redis, tmp_path: Path, other: dict[str, Any]
) -> None:
    """A forgotten option is no new history: every entry is refused, with the row that it has already."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(3)], [_archive(0)])
    _import(redis, folder)
    assert _counts(_import(redis, folder, **other)) == [(3, 0, 0, 3), (1, 0, 0, 1)]
    with get_db() as db:
        tables = ("portfolio_history", "signal_archives")
        assert [db.scalar(text(f"SELECT count(*) FROM {table}")) for table in tables] == [3, 1]
    assert {reason.partition("row ")[0] for _, _, reason in _reported(folder)} == {"was imported before, as "}
    assert _counts(_import(redis, folder)) == [(3, 0, 3, 0), (1, 0, 1, 0)]


@pytest.mark.usefixtures("worker")
def test_an_entry_put_in_between_comes_in_although_all_numbers_shift(redis: Redis, tmp_path: Path) -> None:
    """It stands at a number under which another entry was stored; that one is known by its event."""
    entries = [_snapshot(n) for n in (0, 1, 3, 4)]
    _import(redis, _write(tmp_path / "old", entries))
    entries.insert(2, _snapshot(2))
    assert _counts(_import(redis, _write(tmp_path / "old", entries))) == [(5, 1, 4, 0)]
    assert _verify(tmp_path / "old") == []


@pytest.mark.usefixtures("worker")
def test_verify_looks_at_what_follows_from_the_content_too(redis: Redis, tmp_path: Path) -> None:
    """A row that somebody has moved to another portfolio or month has the id of the old one."""
    folder = _write(tmp_path / "old", [_snapshot(0)], [_archive(0)])
    _import(redis, folder)
    _execute("UPDATE portfolio_history SET portfolio_id = 2")
    _execute("UPDATE signal_archives SET archive_month = '2020-01', portfolio_id = NULL")
    found = [(one.what, [field.field for field in one.fields]) for one in _verify(folder)]
    assert found == [("differs", ["portfolio_id"]), ("differs", ["portfolio_id", "archive_month"])]


def test_a_report_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="the report could not be written"):
        Report(tmp_path / "nowhere" / "report.jsonl")


def test_an_earlier_report_is_kept_but_a_pipe_stays_what_it_is(tmp_path: Path) -> None:
    """Somebody reads from it; and /dev/null must stay where it is."""
    pipe, earlier = tmp_path / "pipe", tmp_path / "report.jsonl"
    os.mkfifo(pipe)
    earlier.write_text("earlier")
    for path in (pipe, earlier):
        with Report(path):
            pass
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "report.jsonl.1"]


@pytest.mark.usefixtures("worker")
def test_a_rejection_that_a_person_gave_up_stays_given_up(redis: Redis, tmp_path: Path) -> None:
    """It is reported, not sent again, and not recorded as rejected once more."""
    folder = _write(tmp_path / "old", [_snapshot(0), _snapshot(0, balance=1), _snapshot(1, balance="?")])
    _import(redis, folder)
    discard(rejections(), redis, "history", "known")

    assert _counts(_import(redis, folder)) == [(3, 0, 1, 2)]
    assert list(rejections()) == []


@pytest.mark.usefixtures("worker")
def test_only_what_is_missing_is_sent(redis: Redis, tmp_path: Path) -> None:
    """Rows that were lost, whatever old acknowledgements say; entries that were appended since."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(20)])
    _import(redis, folder)
    _execute("DELETE FROM portfolio_history WHERE sequence IN (3, 7)")
    (source,) = {one.source for one in audit()}
    source_id = source.rpartition("/")[2]
    old: dict[Any, Any] = {
        f"{source_id}-3": "1 - stored:4",
        f"{source_id}-7": "1 - rejected:of another database",
        "x": "y",
    }
    redis.hset(acknowledgement_key(source), mapping=old)
    _write(folder, [_snapshot(n) for n in range(22)])

    assert _counts(_import(redis, folder)) == [(22, 4, 18, 0)]
    assert _verify(folder) == []


@pytest.mark.usefixtures("worker")
def test_what_live_traffic_brought_already_is_accounted_for(redis: Redis, tmp_path: Path) -> None:
    """The fact is one row, and the file's number is recorded as a duplicate, once."""
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        moment = _FIRST.replace(tzinfo=UTC)
        values = {name: value for name, value in _snapshot(0).items() if name not in ("date", "timestamp")}
        payload = a_snapshot(timestamp=moment, snapshot_date=moment.date(), **values)
        producer.record(payload).wait(20)
    folder = _write(tmp_path / "old", [_snapshot(0), _snapshot(1)])

    assert _counts(_import(redis, folder)) == [(2, 1, 1, 0)]
    assert _counts(_import(redis, folder)) == [(2, 0, 2, 0)]
    imported = next(one for one in audit() if one.source.startswith("import/"))
    assert (imported.stored, imported.duplicate, imported.missing) == (1, 1, [])
    assert _verify(folder) == []


@pytest.mark.usefixtures("worker")
def test_verify_finds_what_differs_on_either_side(redis: Redis, tmp_path: Path) -> None:
    """A changed amount, a changed signal, a lost row, a row too many; not what other portfolios or times have."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(5)], [_archive(n) for n in range(3)])
    _import(redis, folder)
    _execute("UPDATE portfolio_history SET balance = balance + 0.00000001, trade_count = 9 WHERE sequence = 1")
    _execute("DELETE FROM portfolio_history WHERE sequence = 2")
    _execute(
        "UPDATE signal_archives SET signals_data = jsonb_set(signals_data, '{0,amount}', '121') WHERE sequence = 1"
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
    assert found[2].fields == [("signals.0.amount", "120", "121")]
    assert "of portfolio 1, recorded by direct, stands for no entry" in found[3].reason


def test_a_set_of_row_ids_holds_what_was_added() -> None:
    """Also far apart."""
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


def test_the_window_follows_the_workers() -> None:
    """Half a second of what they have lately done, between its bounds."""
    window = Window(0.0)
    sizes = [window.jobs]
    for tick in range(1, 200):
        window.settled(20, tick / 100)
        sizes.append(window.jobs)
    assert (sizes[0], sizes[-1]) == (FEWEST_JOBS, 1000)
    window.settled(0, 10.0)
    window.settled(0, 12.0)
    assert window.jobs == FEWEST_JOBS


@contextmanager
def _importing(redis: Redis, folder: Path, said: list[str], **about: Any) -> Iterator[list[Tally]]:
    """In a thread, which must have ended at the end of the block."""
    tallies: list[Tally] = []
    thread = threading.Thread(target=lambda: tallies.extend(_import(redis, folder, said, **about)), daemon=True)
    thread.start()
    yield tallies
    thread.join(60)
    assert not thread.is_alive()


def test_without_a_worker_little_is_enqueued_and_it_is_said(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live events find a short queue; when a worker comes, the import goes on."""
    monkeypatch.setattr(flight_module, "_CHECK_SECONDS", 0.3)
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(2000)])
    said: list[str] = []
    with _importing(redis, folder, said) as tallies:
        until(lambda: bool(said))
        queued = redis.llen(_QUEUE)
        with worker_process(tmp_path / "worker.log"):
            until(lambda: bool(tallies), 60)
    assert said == ["no worker is running: waiting for one (trading-history worker)"]
    assert queued == FEWEST_JOBS
    assert _counts(tallies) == [(2000, 2000, 0, 0)]


@pytest.mark.usefixtures("worker")
def test_live_events_do_not_wait_for_the_import(redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each, few more rows of the import than a window holds: those under way, and those until it is sent."""
    monkeypatch.setattr(flight_module, "MOST_JOBS", 400)
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(8000)])
    before = []
    with (
        HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer,
        _importing(redis, folder, []) as tallies,
    ):
        for number in range(10):
            seen = _rows()
            row = producer.record(a_snapshot(after=timedelta(seconds=number))).wait(20)
            until(lambda row=row: bool(tallies) or _rows() > row + 300)  # type: ignore[misc]  # mypy wants a type
            if tallies:
                break
            before.append(row - seen)
    assert len(before) >= 3
    assert median(before) < 900
    assert _counts(tallies) == [(8000, 8000, 0, 0)]


def _rows() -> int:
    with get_db() as db:
        return int(db.scalar(text("SELECT coalesce(max(id), 0) FROM portfolio_history")) or 0)


@pytest.mark.parametrize("loss", ["flushed", "one job", "failed elsewhere"])
def test_what_redis_lost_is_sent_again(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, work: Callable[[], None]
) -> None:
    """Everything, a single job, or a job that another program failed without a word."""
    monkeypatch.setattr(flight_module, "_CHECK_SECONDS", 0.3)
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(20)])
    with _importing(redis, folder, []) as tallies:
        until(lambda: redis.llen(_QUEUE) == 20)
        if loss == "flushed":
            redis.flushall()
        else:
            job_id = redis.lpop(_QUEUE)
            assert isinstance(job_id, bytes)
            if loss == "one job":
                redis.delete(b"rq:job:" + job_id)
            else:
                redis.hset(b"rq:job:" + job_id, "status", "failed")
        until(lambda: redis.llen(_QUEUE) == 20)
        work()
    assert _counts(tallies) == [(20, 20, 0, 0)]


def test_what_is_no_acknowledgement_neither_ends_an_import_nor_settles_anything(
    redis: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    work: Callable[[], None],
) -> None:
    """Whoever wrote it: it is dropped with a word, and every entry ends by what a worker says of it."""
    monkeypatch.setattr(flight_module, "_CHECK_SECONDS", 0.3)
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(20)])
    (history,) = _histories(folder)
    next(history.items())
    key = acknowledgement_key(history.source)
    strays: dict[Any, Any] = {
        f"{history.source_id}-{'9' * 5000}": "1 - stored:1",
        b"\xff": "1 - stored:1",
        f"{history.source_id}-1": b"\xfe",
        f"{history.source_id}-2": f"1 - stored:{'9' * 5000}",
        "x": "1 - stored:1",
    }
    with _importing(redis, folder, []) as tallies:
        until(lambda: redis.llen(_QUEUE) == 20)
        redis.hset(key, mapping=strays)
        until(lambda: not redis.exists(key))
        work()
    assert _counts(tallies) == [(20, 20, 0, 0)]
    dropped = [record for record in caplog.records if "it is no acknowledgement" in record.getMessage()]
    assert len(dropped) == len(strays)


def test_an_outage_of_redis_is_waited_for_and_said_once(redis: Redis, tmp_path: Path) -> None:
    """What was on its way when it broke is neither lost nor doubled."""
    socket = str(Redis.from_url(os.environ["REDIS_URL"]).connection_pool.connection_kwargs["path"])
    proxy = Proxy(tmp_path / "proxy.sock", Path(socket))
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(3000)])
    said: list[str] = []
    with proxy.running(), worker_process(tmp_path / "worker.log"):
        broken = Redis(unix_socket_path=str(tmp_path / "proxy.sock"), socket_timeout=0.5)
        with _importing(broken, folder, said) as tallies:
            until(lambda: _rows() > 500)
            proxy.set_mode("refuse")
            proxy.cut()
            until(lambda: bool(said))
            proxy.set_mode("pass")
            until(lambda: bool(tallies), 60)
        broken.close()
    assert [line.split(":")[0] for line in said] == ["waiting for Redis", "Redis is back, going on"]
    (tally,) = tallies
    assert (tally.read, tally.settled, tally.rejected) == (3000, 3000, 0)
    assert _verify(folder) == []


@pytest.mark.parametrize("victims", [("import",), ("worker",), ("import", "worker")])
def test_after_kill_9_in_the_middle_a_second_run_completes_it(
    redis: Redis, tmp_path: Path, victims: tuple[str]
) -> None:
    """Of the import, of the worker, or of both: afterwards verify is clean and the audit complete."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(6000)], [_archive(n) for n in range(100)])
    arguments = ("import", str(folder), "--timezone", "UTC", "--portfolio-id", "1", "--json")
    with worker_process(tmp_path / "worker.log") as worker, _command(*arguments) as dying:
        until(lambda: _rows() > 300, 40)
        if "import" in victims:
            dying.kill()
        if "worker" in victims:
            worker.kill()
        if "import" in victims:
            dying.communicate(timeout=20)
        worker.kill()
        worker.wait()
        assert _rows() < 6000
        # That a dead worker's lease ends is proven elsewhere.
        for lease in redis.scan_iter(lease_key("history", "*")):
            redis.delete(lease)
        with worker_process(tmp_path / "heir.log"):
            if "import" in victims:
                with _command(*arguments) as heir:
                    output, errors = heir.communicate(timeout=90)
            else:
                output, errors = dying.communicate(timeout=90)
    files = json.loads(output)["files"]
    assert sum(one["stored"] + one["already_there"] for one in files) == 6100, errors
    with _command("verify", str(folder), "--timezone", "UTC", "--portfolio-id", "1", "--json") as verify:
        assert json.loads(verify.communicate(timeout=60)[0])["differences"] == []
    assert verify.returncode == 0
    assert all(one.complete for one in audit())


@pytest.mark.usefixtures("worker")
def test_the_commands_print_tables_and_json_and_exit_as_they_should(tmp_path: Path) -> None:
    """0 when all is well, 1 with something rejected or different, 2 for wrong usage; a dry run needs no server."""
    folder = _write(tmp_path / "old", [_snapshot(0), _snapshot(1, balance="?")], [_archive(0, extra=1)])
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
    assert "signals_archive_2025-10.json: unknown key 'extra' left out (1 times)" in dry[1]
    (line,) = Path("dry.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "file": "portfolio_history.json",
        "index": 1,
        "reason": "balance: is text that is not a number",
        "entry": _snapshot(1, balance="?"),
    }
    assert real[0] == 1
    assert real[1].splitlines()[1].split() == ["portfolio_history.json", "2", "1", "0", "1", "none"]
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


def test_ctrl_c_says_how_far_it_came(redis: Redis, tmp_path: Path) -> None:
    """On stderr, without a traceback, and that running it again goes on."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(500)])
    with _command("import", str(folder)) as running:
        until(lambda: redis.llen(_QUEUE) > 0)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=20)
    assert running.returncode == 130
    assert errors.splitlines()[-1] == "stopped after 0 entries; run it again to go on"
    assert "Traceback" not in errors


def test_jobs_left_by_a_dead_import_are_not_doubled(
    redis: Redis, tmp_path: Path, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run finds them on their way and waits for them."""
    folder = _write(tmp_path / "old", [_snapshot(n) for n in range(30)])
    with _command("import", str(folder), "--timezone", "UTC", "--portfolio-id", "1") as dying:
        until(lambda: redis.llen(_QUEUE) == 30)
        dying.kill()
    sweeps = 0
    original = Flight._take_acknowledgements

    def counted(flight: Flight) -> int:
        nonlocal sweeps
        sweeps += 1
        return original(flight)

    monkeypatch.setattr(Flight, "_take_acknowledgements", counted)
    with _importing(redis, folder, []) as tallies:
        until(lambda: sweeps > 1)  # the first one handed over what was to be handed over
        assert redis.llen(_QUEUE) == 30
        work()
    assert _counts(tallies) == [(30, 30, 0, 0)]


_NAN = float("nan")


def _with_nan(folder: Path) -> Path:
    """NaN first, in the middle and last, in either file."""
    broken = [_snapshot(0, balance=_NAN), _snapshot(2, trade_count=-float("inf")), _snapshot(4, extra={"a": [_NAN]})]
    archives = [
        _archive(0, signals=[a_signal(), a_signal(deep=[1, {"price": _NAN}])], signals_count=2),
        _archive(1),
        _archive(2, signals_count=_NAN),
        _archive(3),
        _archive(4, signals=[a_signal(target_price=float("inf"), amount=_NAN)]),
    ]
    return _write(folder, [broken[0], _snapshot(1), broken[1], _snapshot(3), broken[2]], archives)


_REFUSED = [
    ("portfolio_history.json", 0, "balance: must be finite, not NaN or Infinity"),
    ("portfolio_history.json", 2, "trade_count: must be finite, not NaN or Infinity"),
    ("portfolio_history.json", 4, "extra.a.0: must be finite, not NaN or Infinity"),
    (
        "signals_archive_2025-10.json",
        0,
        "signals.1.deep.1.price: must be finite and within ±1.8e308 (--nan-as-null takes NaN in signals as null)",
    ),
    ("signals_archive_2025-10.json", 2, "signals_count: must be finite, not NaN or Infinity"),
    (
        "signals_archive_2025-10.json",
        4,
        "signals.0.target_price: must be finite and within ±1.8e308 (--nan-as-null takes NaN in signals as null)",
    ),
]


@pytest.mark.usefixtures("worker")
def test_an_entry_with_nan_is_refused_and_the_rest_of_file_and_folder_is_read(redis: Redis, tmp_path: Path) -> None:
    """By the import, which records it, by a dry run and by verify: each names file, entry and field."""
    folder = _with_nan(tmp_path / "old")
    with Report(tmp_path / "dry.jsonl") as report:
        for history in _histories(folder):
            look(history, report, lambda: None)
    assert _reported_lines(tmp_path / "dry.jsonl") == _REFUSED

    assert _counts(_import(redis, folder)) == [(5, 2, 0, 3), (5, 2, 0, 3)]
    assert _reported(folder) == _REFUSED
    assert _counts(_import(redis, folder)) == [(5, 0, 2, 3), (5, 0, 2, 3)]
    assert [(one.what, one.file, one.index, one.reason) for one in _verify(folder)] == [
        ("unusable", *refused) for refused in _REFUSED
    ]
    assert sorted(one.reason or "" for one in rejections()) == sorted(reason for _, _, reason in _REFUSED)
    assert [(one.stored, one.rejected, one.complete) for one in audit()] == [(2, 3, True)] * 2


@pytest.mark.usefixtures("worker")
def test_with_the_option_nan_in_signals_is_null_and_counted(redis: Redis, tmp_path: Path) -> None:
    """Amounts stay refused. An earlier refusal gives way, and verify with the option finds what was stored."""
    folder = _with_nan(tmp_path / "old")
    _import(redis, folder)

    tallies = _import(redis, folder, nan_as_null=True)

    assert _counts(tallies) == [(5, 0, 2, 3), (5, 2, 2, 1)]
    note = "NaN or Infinity in signals taken as null; verify needs --nan-as-null too"
    assert [dict(tally.notes) for tally in tallies] == [{}, {note: 3}]
    assert _reported(folder) == [one for one in _REFUSED if "--nan-as-null" not in one[2]]
    assert sorted(one.reason or "" for one in rejections()) == sorted(reason for _, _, reason in _reported(folder))
    with get_db() as db:
        rows = db.execute(text("SELECT signals_data FROM signal_archives ORDER BY archived_at")).scalars().all()
    assert [row[-1].get("deep") for row in rows] == [[1, {"price": None}], None, None, None]
    assert (rows[3][0]["target_price"], rows[3][0]["amount"]) == (None, None)
    assert {one.what for one in _verify(folder, nan_as_null=True)} == {"unusable"}
    assert [one.what for one in _verify(folder)][-2:] == ["unexpected", "unexpected"]


@pytest.mark.usefixtures("worker")
def test_without_the_option_a_later_import_leaves_what_an_earlier_one_stored_with_it(
    redis: Redis, tmp_path: Path
) -> None:
    """The entry is refused with the row that it has, and no rejection is recorded beside the row."""
    folder = _with_nan(tmp_path / "old")
    _import(redis, folder, nan_as_null=True)
    before = audit()

    assert _counts(_import(redis, folder)) == [(5, 0, 2, 3), (5, 0, 2, 3)]

    reasons = [reason for file, index, reason in _reported(folder) if file.startswith("signals") and index != 2]
    rows = [int(reason.rpartition(" ")[2]) for reason in reasons]
    assert [reason.partition("; ")[2] for reason in reasons] == [
        f"an earlier import stored this number as row {row}" for row in rows
    ]
    with get_db() as db:
        stored = db.execute(text("SELECT id FROM signal_archives WHERE sequence IN (0, 4) ORDER BY sequence")).scalars()
        assert list(stored) == rows
    assert audit() == before
    assert _counts(_import(redis, folder, nan_as_null=True)) == [(5, 0, 2, 3), (5, 0, 4, 1)]


def test_an_import_with_nan_as_null_that_was_killed_goes_on_without_doubling(
    redis: Redis, tmp_path: Path, work: Callable[[], None]
) -> None:
    """Whether the next run has the option or not: the jobs on their way are the same deliveries."""
    archives = [_archive(n, signals=[a_signal(price=_NAN if n % 2 == 0 else n)]) for n in range(20)]
    folder = _write(tmp_path / "old", archives=archives)
    arguments = ("import", str(folder), "--timezone", "UTC", "--portfolio-id", "1", "--nan-as-null")
    with _command(*arguments) as dying:
        until(lambda: redis.llen(_QUEUE) == 20)
        dying.kill()
    with _importing(redis, folder, []) as without:
        until(lambda: len(list(rejections())) == 10)
        work()
    with _importing(redis, folder, [], nan_as_null=True) as tallies:
        pass
    assert (_counts(without), _counts(tallies)) == ([(20, 10, 0, 10)], [(20, 0, 20, 0)])
    assert list(rejections()) == []
    assert [(one.stored, one.rejected, one.complete) for one in audit()] == [(20, 0, True)]
    assert _verify(folder, nan_as_null=True) == []


@pytest.mark.usefixtures("worker")
def test_the_commands_say_which_entry_has_nan_and_take_the_option(tmp_path: Path) -> None:
    """NaN first in the file ended all three in a traceback; a dry run needs no server."""
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
    note = "NaN or Infinity in signals taken as null; verify needs --nan-as-null too (1 times)"
    assert f"signals_archive_2025-10.json: {note}" in with_option[1]
    assert [
        (one["file"], one["index"]) for one in map(json.loads, Path("import-report.jsonl").read_text().splitlines())
    ] == [("portfolio_history.json", 0)]
    assert agreed[1].startswith("unusable: portfolio_history.json entry 0: balance: must be finite")
    assert agreed[1].count("unusable") == 1
    assert "NaN and Infinity in signals were read as null." in agreed[1]

"""The fixture for tests of controllers: it needs no server, leaves nothing behind and reaches nothing real."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import datetime, timedelta
from decimal import Decimal
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakeredis import FakeRedis
from redis import Redis

from producers import pytest_plugin
from producers.errors import EventRejected, HistoryError, InvalidEvent, ProducerClosed
from producers.events import Event
from producers.history_producer import HistoryProducer, Receipt
from producers.outbox import Outbox
from producers.testing import FakeHistory, redirect
from producers.trading_controller import archive_current_signals, create_daily_portfolio_snapshot
from tests.factories import INSTANT, a_portfolio, a_signal, a_snapshot, an_archive
from tests.forking import in_child
from tests.unit.conftest import queue_of

pytest_plugins = ["pytester"]

CHILD = """
from producers import trading_controller
trading_controller.create_daily_portfolio_snapshot({"balance": 5})
trading_controller.shared_producer().close(timeout=0)
"""


def _record(number: int = 0, **options: Any) -> Receipt:
    return create_daily_portfolio_snapshot(a_portfolio(), 1, timestamp=INSTANT + timedelta(seconds=number), **options)


# ---- recorded events


def test_calls_without_a_producer_are_recorded_as_models_in_order(trading_history: FakeHistory) -> None:
    """The controller's code is unchanged. Numbers in signals are exact, as workers receive them."""
    snapshot = _record()
    archive_current_signals([{"market_id": "1", "price": 0.1}], archived_at=INSTANT)
    _record(1)

    assert [event.sequence for event in trading_history.events] == [1, 2, 3]
    assert trading_history.events[0].id == snapshot.event_id
    assert [one.timestamp for one in trading_history.snapshots] == [INSTANT, INSTANT + timedelta(seconds=1)]
    (archive,) = trading_history.archives
    assert archive.signals == [{"market_id": "1", "price": Decimal("0.1")}]


def test_a_history_without_events_is_empty(trading_history: FakeHistory) -> None:
    """Neither `events` nor `work` raises an error."""
    assert (trading_history.events, trading_history.work()) == ([], [])


def test_assertions_compare_values_as_they_are_recorded(trading_history: FakeHistory) -> None:
    """A test may use the controller's floats, in amounts and in signals. The newest match is returned."""
    for number in range(2):
        _record(number)
    archive_current_signals([a_signal()], portfolio_id=1, archived_at=INSTANT)

    found = trading_history.assert_snapshot(total_profit_loss=87.350000000001, balance=9900, portfolio_id=1)
    assert found == trading_history.snapshots[1]
    assert trading_history.assert_archive(signals=[a_signal()]).portfolio_id == 1


def test_a_failed_assertion_lists_the_recorded_events(trading_history: FakeHistory) -> None:
    """It shows only the asserted fields. A field that does not exist is a TypeError."""
    with pytest.raises(AssertionError, match="^no PortfolioSnapshot was recorded$"):
        trading_history.assert_snapshot()
    _record()
    message = (
        "^no PortfolioSnapshot with balance=1, trade_count=2 among the 1 recorded:\n"
        r"  balance=Decimal\('9900'\), trade_count=2$"
    )
    with pytest.raises(AssertionError, match=message):
        trading_history.assert_snapshot(balance=1, trade_count=2)
    with pytest.raises(TypeError, match="^PortfolioSnapshot has no field signals$"):
        trading_history.assert_snapshot(signals=[])
    with pytest.raises(InvalidEvent, match="^balance: "):
        trading_history.assert_snapshot(balance="much")


# ---- Redis is down


def test_events_recorded_while_redis_is_down_are_delivered_after_it(trading_history: FakeHistory) -> None:
    """Even those of a producer that is closed by then."""
    with trading_history.redis_down():
        first = _record()
        with HistoryProducer(name="evening-bot") as own:
            second = _record(1, producer=own)
            own.close(timeout=0)
        with trading_history.redis_down():
            _record(2)
        assert trading_history.producer.flush(0.01) == 3
        with pytest.raises(HistoryError, match="^Redis is down"):
            trading_history.work()
    assert sorted(str(outcome) for outcome in trading_history.work()) == ["stored:1", "stored:2", "stored:3"]
    assert (first.wait(0), second.source.split("/")[0]) == (1, "evening-bot")


# ---- the worker


def test_a_worker_stores_a_fact_once_and_rejects_other_content(trading_history: FakeHistory) -> None:
    """Each table numbers its rows from 1."""
    producer = trading_history.producer
    receipts = producer.record_many([a_snapshot(), an_archive(), a_snapshot(after=timedelta(1)), a_snapshot()])
    receipts.append(producer.record(a_snapshot(balance=1)))
    outcomes = [str(outcome) for outcome in trading_history.work()]

    assert outcomes[:4] == ["stored:1", "stored:1", "stored:2", "duplicate:1"]
    assert [receipt.wait(0) for receipt in receipts[:4]] == [1, 1, 2, 1]
    with pytest.raises(EventRejected, match="is stored already as row 1 of portfolio_history, with other content$"):
        receipts[4].wait(0)


def test_a_worker_names_a_job_that_is_not_an_event(trading_history: FakeHistory) -> None:
    """Code under test enqueued it. It stays in the queue."""
    job = queue_of(trading_history.redis).enqueue("os.system", "true")
    with pytest.raises(HistoryError, match=rf"^job {job.id}: os\.system is not a job function of this project$"):
        trading_history.work()
    assert queue_of(trading_history.redis).job_ids == [job.id]


def test_a_worker_rejects_chosen_events_for_a_given_reason(trading_history: FakeHistory) -> None:
    """`reject` is a reason for all, or a function. If the function fails, the event stays for the next call."""

    def implausible(event: Event) -> str | None:
        return "balance: not plausible" if event.sequence == 2 else None

    receipts = [_record(number) for number in range(2)]
    with pytest.raises(ZeroDivisionError):
        trading_history.work(reject=lambda _: str(1 // 0))
    trading_history.work(reject=implausible)
    receipts.append(_record(2))
    trading_history.work(reject="no")

    assert receipts[0].wait(0) == 1
    for receipt, reason in zip(receipts[1:], ("balance: not plausible", "no"), strict=True):
        with pytest.raises(EventRejected, match=f"was rejected: {reason}$"):
            receipt.wait(0)


def test_a_worker_runs_in_the_block_for_code_that_waits_for_its_receipt(trading_history: FakeHistory) -> None:
    """An outage in the block only delays it. An error in `reject` is raised at the end of the block."""
    with trading_history.worker():
        assert _record().wait(10) == 1
        with trading_history.redis_down(), pytest.raises(TimeoutError):
            _record(1).wait(0.01)
        assert _record(2).wait(10) == 3
    with pytest.raises(TimeoutError):
        _record(3).wait(0.01)
    with pytest.raises(ZeroDivisionError), trading_history.worker(reject=lambda _: str(1 // 0)):
        trading_history.producer.flush(10)


# ---- isolation from real servers


@pytest.fixture
def real_redis() -> Iterator[socket.socket]:
    """A socket that listens in place of the developer's Redis. A test can see whether anything has connected."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


def test_neither_arguments_nor_settings_lead_to_a_real_redis_or_outbox(
    real_redis: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the environment before and in the block, nor .env, nor the client and path that the caller passes."""
    url, outbox = f"redis://127.0.0.1:{real_redis.getsockname()[1]}/0", tmp_path / "real.db"
    Path(".env").write_text(f"REDIS_URL={url}\nHISTORY_OUTBOX={outbox}\nHISTORY_TIMEZONE=nonsense\n", "utf-8")
    monkeypatch.setenv("REDIS_URL", url)
    with FakeHistory() as history:
        _record()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REDIS_URL", url)
            patch.setenv("HISTORY_OUTBOX", str(outbox))
            _record(1, producer=HistoryProducer(name="by-settings"))
        _record(2, producer=HistoryProducer(redis=Redis.from_url(url), outbox=outbox, queue="real", name="mine"))
        assert [str(outcome) for outcome in history.work()] == ["stored:1", "stored:2", "stored:3"]
        assert len(history.events) == 3
    assert not outbox.exists()
    with pytest.raises(BlockingIOError):
        real_redis.accept()


def test_a_producer_made_before_is_redirected_only_in_the_block(tmp_path: Path) -> None:
    """For example one that a module makes on import. Its pending entries stay in its outbox."""
    path = tmp_path / "own.db"
    with HistoryProducer(Redis(port=1), outbox=path, name="early", queue="own") as early:
        _record(producer=early)
        with FakeHistory() as history:
            receipt = _record(1, producer=early)
            assert [str(outcome) for outcome in history.work()] == ["stored:1"]
            assert (receipt.wait(0), len(history.events)) == (1, 1)
        assert _record(2, producer=early).sequence == 2
        assert Outbox(path).status().pending == 2
        early.close(timeout=0)

    before = {thread for thread in threading.enumerate() if thread.name == "history-relay"}
    late = HistoryProducer(Redis(port=1), outbox=path)
    with FakeHistory() as history:
        _record(producer=late)
        late.close()
    with pytest.raises(ProducerClosed):
        _record(producer=late)
    assert {thread for thread in threading.enumerate() if thread.name == "history-relay"} <= before


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_child_processes_record_to_the_same_outbox(trading_history: FakeHistory) -> None:
    """Forked or spawned: the environment names this outbox, and this process delivers their events."""

    def record_and_flush() -> None:
        _record()
        assert trading_history.producer.flush(1) == 1  # no relay runs in a forked child
        with pytest.raises(HistoryError, match="forked child"):
            trading_history.work()

    assert in_child(record_and_flush) == 0
    subprocess.run([sys.executable, "-c", CHILD], check=True, timeout=60)
    assert sorted(str(outcome) for outcome in trading_history.work()) == ["stored:1", "stored:2"]


def _redis_url() -> str | None:
    return os.environ.get("REDIS_URL")


def test_a_producer_made_in_the_block_is_closed_after_it() -> None:
    with FakeHistory():
        producer = HistoryProducer()
        _record(producer=producer)
    with pytest.raises(ProducerClosed):
        _record(1, producer=producer)
    with pytest.raises(ProducerClosed):
        producer.status()


def test_a_fork_server_that_already_runs_is_not_used_in_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its children would have the environment from before. After the block it is used again."""
    monkeypatch.setenv("REDIS_URL", "redis://real")
    context = multiprocessing.get_context("forkserver")

    def ask() -> str | None:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_redis_url).result(30)

    try:
        assert ask() == "redis://real"
        before = psutil.Process().children()
        with FakeHistory():
            assert ask() == os.environ["REDIS_URL"] != "redis://real"
        assert ask() == "redis://real"
        assert psutil.Process().children() == before
    finally:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # not in its stubs


# ---- clean-up


def test_a_thread_that_outlives_the_test_records_nothing(tmp_path: Path) -> None:
    """Neither with a new producer nor with an old one. In the next block it can record again."""
    with HistoryProducer(Redis(port=1), outbox=tmp_path / "own.db") as early, ThreadPoolExecutor(1) as pool:
        with FakeHistory() as history:
            pool.submit(_record).result(10)
            assert len(history.events) == 1
        for producer in (None, early):
            with pytest.raises(HistoryError, match="^this thread outlived the test that started it"):
                pool.submit(_record, producer=producer).result(10)
        with FakeHistory() as history:
            pool.submit(_record).result(10)
            assert len(history.events) == 1
        assert _record(producer=early).sequence == 1
        early.close(timeout=0)
    assert not Path("data").exists()


def test_closing_leaves_no_thread_no_variable_and_no_shared_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the test fails. Producers that were made in it are closed."""
    monkeypatch.setenv("HISTORY_QUEUE", "mine")
    threads, variables = set(threading.enumerate()), dict(os.environ)
    made: list[HistoryProducer] = []
    folders: list[Path] = []

    def fail() -> None:
        with FakeHistory() as history, history.redis_down():
            folders.append(Path(os.environ["HISTORY_OUTBOX"]).parent)
            made.extend((HistoryProducer(name="forgotten"), history.producer))
            for producer in made:
                _record(producer=producer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert set(threading.enumerate()) <= threads
    assert dict(os.environ) == variables
    assert [producer.closed for producer in made] == [True, True]
    assert not folders[0].exists()
    with FakeHistory() as history:
        assert history.events == []
        assert history.producer not in made


def test_redirect_takes_a_client_and_a_file(tmp_path: Path) -> None:
    """Only one redirection is active at a time, and one that fails is undone."""
    client = FakeRedis()

    def fail() -> None:
        with redirect(client, tmp_path / "mine.db", queue="mine"):
            producer = HistoryProducer(Redis(port=1), outbox=tmp_path / "other.db")
            _record(producer=producer)
            assert producer.flush(10) == 0
            with (
                pytest.raises(HistoryError, match="another FakeHistory is active"),
                redirect(client, tmp_path / "second.db"),
            ):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert client.llen("rq:queue:mine") == 1
    assert [path.name for path in tmp_path.glob("*.db")] == ["mine.db"]
    with redirect(client, tmp_path / "mine.db", queue="mine"):
        assert _record(1).sequence == 2


def test_producers_do_not_import_code_for_tests() -> None:
    script = "import producers.trading_controller, producers.relay_process, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    unwanted = {"producers.testing", "producers.child_environment", "producers.fake_worker", "fakeredis"}
    assert not unwanted & set(loaded.stdout.split())


def test_only_one_fake_history_is_open_at_a_time(trading_history: FakeHistory) -> None:
    """A second one would redirect the producers of the first."""
    with pytest.raises(HistoryError, match="^another FakeHistory is active"), FakeHistory():
        pass
    _record()
    assert len(trading_history.events) == 1


def test_a_stopped_clock_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests stop the clock: neither the worker nor the end of the block waits for it."""
    with FakeHistory() as history:
        monkeypatch.setattr(time, "monotonic", lambda: 1.0)
        monkeypatch.setattr(time, "time", lambda: 1.0)
        receipt = _record()
        history.work()
        assert receipt.wait(0) == 1
        with history.redis_down():
            _record(1)


def test_a_test_can_set_the_time_zone(trading_history: FakeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    """HISTORY_TIMEZONE is read at the first call."""
    monkeypatch.setenv("HISTORY_TIMEZONE", "Asia/Tokyo")
    create_daily_portfolio_snapshot({"balance": 1}, timestamp=datetime(2026, 1, 1))
    assert trading_history.snapshots[0].timestamp.utcoffset() == timedelta(hours=9)


# ---- the plugin


def test_the_plugin_imports_nothing_before_the_fixture_is_used() -> None:
    """Every run of pytest in the environment loads the plugin."""
    script = (
        "import pytest, sys; had = set(sys.modules); import producers.pytest_plugin; print(*set(sys.modules) - had)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert set(loaded.stdout.split()) == {"producers", "producers.pytest_plugin"}


def test_without_fakeredis_the_fixture_names_the_package_to_install(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test that uses the fixture fails with one line."""
    monkeypatch.setitem(sys.modules, "fakeredis", None)
    for module in ("producers.testing", "producers.child_environment"):
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(pytest.fail.Exception, match=re.escape(": pip install '.[testing]' in a clone")):
        request.getfixturevalue("trading_history")


@pytest.mark.parametrize(
    "files",
    [
        {"__init__.py": "import a_module_that_is_missing"},
        {"__init__.py": "1 / 0"},
        {"__init__.py": "", "testing.py": "", "child_environment.py": ""},
    ],
    ids=["failing import", "failing code", "same modules"],
)
def test_another_package_with_the_name_is_named_whatever_is_in_it(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "producers").mkdir()
    for name, content in files.items():
        (tmp_path / "producers" / name).write_text(content)
    shutil.copy(pytest_plugin.__file__, tmp_path / "plugin.py")
    (tmp_path / "test_own.py").write_text("def test_own(trading_history): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert f"another package named `producers` ({tmp_path / 'producers'}" in run.stdout, run.stdout + run.stderr
    assert "Traceback" not in run.stdout
    assert "import " not in run.stdout


def test_variables_that_a_test_changes_are_restored(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """monkeypatch is undone after the fixture, and must not restore the values of the fixture."""
    monkeypatch.setenv("REDIS_URL", "redis://mine")
    pytester.makepyfile("""
        import os
        def test_first(trading_history, monkeypatch): monkeypatch.setenv("REDIS_URL", "redis://other")
        def test_second(): assert os.environ["REDIS_URL"] == "redis://mine"
    """)
    pytester.runpytest_inprocess().assert_outcomes(passed=2)


def test_a_test_that_undoes_its_monkeypatch_stays_redirected_and_restores_the_variables(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that was not set is removed, so that .env applies again."""
    monkeypatch.setenv("REDIS_URL", "redis://mine")
    pytester.makepyfile("""
        import os
        def test_first(monkeypatch, trading_history):
            fake = os.environ["REDIS_URL"]
            monkeypatch.setenv("REDIS_URL", "redis://other")
            monkeypatch.undo()
            assert os.environ["REDIS_URL"] == fake != "redis://mine"
            monkeypatch.setenv("HISTORY_QUEUE", "other")
        def test_second():
            assert os.environ["REDIS_URL"] == "redis://mine"
            assert "HISTORY_QUEUE" not in os.environ
    """)
    pytester.runpytest_inprocess().assert_outcomes(passed=2)

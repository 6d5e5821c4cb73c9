"""What other people's tests get: a history without servers that leaves nothing behind and reaches nothing real."""

from __future__ import annotations

import multiprocessing
import os
import re
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

from producers.errors import EventRejected, HistoryError, InvalidEvent, ProducerClosed
from producers.events import Event
from producers.history_producer import HistoryProducer, Receipt
from producers.outbox import Outbox
from producers.testing import FakeHistory, redirect
from producers.trading_controller import archive_current_signals, create_daily_portfolio_snapshot
from tests.factories import INSTANT, a_portfolio, a_signal, a_snapshot, an_archive
from tests.forking import in_child

pytest_plugins = ["pytester"]

CHILD = """
from producers import trading_controller
trading_controller.create_daily_portfolio_snapshot({"balance": 5})
trading_controller.shared_producer().close(timeout=0)
"""


def _record(number: int = 0, **options: Any) -> Receipt:
    return create_daily_portfolio_snapshot(a_portfolio(), 1, timestamp=INSTANT + timedelta(seconds=number), **options)


# ---- what was recorded


def test_calls_without_a_producer_are_recorded_as_models_in_order(trading_history: FakeHistory) -> None:
    """The controller's own code, unchanged; what workers would get, numbers in signals exact."""
    snapshot = _record()
    archive_current_signals([{"market_id": "1", "price": 0.1}], archived_at=INSTANT)
    _record(1)

    assert [event.sequence for event in trading_history.events] == [1, 2, 3]
    assert trading_history.events[0].id == snapshot.event_id
    assert [one.timestamp for one in trading_history.snapshots] == [INSTANT, INSTANT + timedelta(seconds=1)]
    (archive,) = trading_history.archives
    assert archive.signals == [{"market_id": "1", "price": Decimal("0.1")}]


def test_nothing_recorded_is_nothing(trading_history: FakeHistory) -> None:
    """An empty history, not an error; a worker has nothing to do."""
    assert (trading_history.events, trading_history.work()) == ([], [])


def test_values_are_compared_as_they_are_recorded(trading_history: FakeHistory) -> None:
    """A test may say what its controller said: floats, in amounts and in signals; the newest that fits is given."""
    for number in range(2):
        _record(number)
    archive_current_signals([a_signal()], portfolio_id=1, archived_at=INSTANT)

    found = trading_history.assert_snapshot(total_profit_loss=87.350000000001, balance=9900, portfolio_id=1)
    assert found == trading_history.snapshots[1]
    assert trading_history.assert_archive(signals=[a_signal()]).portfolio_id == 1


def test_a_failed_assertion_lists_the_recorded_events(trading_history: FakeHistory) -> None:
    """Of the fields that were asked for; a field that does not exist is a mistake of the test."""
    with pytest.raises(AssertionError, match="^no PortfolioSnapshot was recorded$"):
        trading_history.assert_snapshot()
    _record()
    told = (
        "^no PortfolioSnapshot with balance=1, trade_count=2 was recorded, but 1:\n"
        r"  balance=Decimal\('9900'\), trade_count=2$"
    )
    with pytest.raises(AssertionError, match=told):
        trading_history.assert_snapshot(balance=1, trade_count=2)
    with pytest.raises(TypeError, match="^PortfolioSnapshot has no signals$"):
        trading_history.assert_snapshot(signals=[])
    with pytest.raises(InvalidEvent, match="^balance: "):
        trading_history.assert_snapshot(balance="much")


# ---- Redis is down


def test_recording_goes_on_while_redis_is_down_and_is_delivered_after_it(trading_history: FakeHistory) -> None:
    """Also what was recorded by a producer that is closed by then."""
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


# ---- the worker's part


def test_a_worker_stores_a_fact_once_and_refuses_other_content(trading_history: FakeHistory) -> None:
    """Rows are numbered in each table."""
    producer = trading_history.producer
    receipts = producer.record_many([a_snapshot(), an_archive(), a_snapshot(after=timedelta(1)), a_snapshot()])
    receipts.append(producer.record(a_snapshot(balance=1)))
    outcomes = [str(outcome) for outcome in trading_history.work()]

    assert outcomes[:4] == ["stored:1", "stored:1", "stored:2", "duplicate:1"]
    assert [receipt.wait(0) for receipt in receipts[:4]] == [1, 1, 2, 1]
    with pytest.raises(EventRejected, match="is stored already as row 1 of portfolio_history, with other content$"):
        receipts[4].wait(0)


def test_a_worker_rejects_chosen_events_for_a_given_reason(trading_history: FakeHistory) -> None:
    """Everything, or what a function names; a function that fails leaves the event for the next try."""

    def unbelievable(event: Event) -> str | None:
        return "balance: is not believed" if event.sequence == 2 else None

    receipts = [_record(number) for number in range(2)]
    with pytest.raises(ZeroDivisionError):
        trading_history.work(reject=lambda _: str(1 // 0))
    trading_history.work(reject=unbelievable)
    receipts.append(_record(2))
    trading_history.work(reject="no")

    assert receipts[0].wait(0) == 1
    for receipt, reason in zip(receipts[1:], ("balance: is not believed", "no"), strict=True):
        with pytest.raises(EventRejected, match=f"was rejected: {reason}$"):
            receipt.wait(0)


def test_code_that_waits_for_its_receipt_meets_a_worker(trading_history: FakeHistory) -> None:
    """In the block only; an outage in it only delays, and a defect of the test is not swallowed."""
    with trading_history.worker():
        assert _record().wait(10) == 1
        with trading_history.redis_down(), pytest.raises(TimeoutError):
            _record(1).wait(0.01)
        assert _record(2).wait(10) == 3
    with pytest.raises(TimeoutError):
        _record(3).wait(0.01)
    with pytest.raises(ZeroDivisionError), trading_history.worker(reject=lambda _: str(1 // 0)):
        trading_history.producer.flush(10)


# ---- nothing real


@pytest.fixture
def real_redis() -> Iterator[socket.socket]:
    """What listens where the developer's Redis is; who connects is there to be accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


def test_neither_arguments_nor_settings_lead_to_a_real_redis_or_outbox(
    real_redis: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the environment, before and while it is open, nor .env, nor a client and a path of the caller's own."""
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


def test_a_producer_made_before_records_here_and_is_itself_again(tmp_path: Path) -> None:
    """As one that a module makes when it is imported; what it had pending is not touched."""
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
def test_child_processes_record_here_too(trading_history: FakeHistory) -> None:
    """Forked or started: the environment leads them to this outbox, and this process carries what they record."""

    def record_and_hand_over() -> None:
        _record()
        assert trading_history.producer.flush(1) == 1  # its copy of the fake Redis is of no use
        with pytest.raises(HistoryError, match="forked child"):
            trading_history.work()

    assert in_child(record_and_hand_over) == 0
    subprocess.run([sys.executable, "-c", CHILD], check=True, timeout=60)
    assert sorted(str(outcome) for outcome in trading_history.work()) == ["stored:1", "stored:2"]


def _redis_url() -> str | None:
    return os.environ.get("REDIS_URL")


def test_a_fork_server_that_runs_already_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its children would have the environment that it was started with; afterwards it is there again."""
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


# ---- nothing left


def test_a_thread_that_outlives_the_test_records_nothing(tmp_path: Path) -> None:
    """By no producer, neither a new nor an old one; in the next test it is code under test again."""
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
    """Whatever the test did, and however it ended; what was made in it refuses to go on."""
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


def test_a_test_may_redirect_to_a_client_and_a_file_of_its_own(tmp_path: Path) -> None:
    """Once at a time; when it has failed in the block, too, all is as before."""
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


def test_no_producer_imports_code_that_is_meant_for_tests() -> None:
    script = "import producers.trading_controller, producers.relay_process, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    unwanted = {"producers.testing", "producers.child_environment", "producers.fake_worker", "fakeredis"}
    assert not unwanted & set(loaded.stdout.split())


def test_only_one_is_open_at_a_time(trading_history: FakeHistory) -> None:
    """A second one would take the first one's producers."""
    with pytest.raises(HistoryError, match="^another FakeHistory is active"), FakeHistory():
        pass
    _record()
    assert len(trading_history.events) == 1


def test_a_clock_that_stands_still_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests freeze time: neither the worker nor the end waits for it to go on."""
    with FakeHistory() as history:
        monkeypatch.setattr(time, "monotonic", lambda: 1.0)
        monkeypatch.setattr(time, "time", lambda: 1.0)
        receipt = _record()
        history.work()
        assert receipt.wait(0) == 1
        with history.redis_down():
            _record(1)


def test_the_zone_is_the_one_of_the_test(trading_history: FakeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    """HISTORY_TIMEZONE counts, if it is set before the first call."""
    monkeypatch.setenv("HISTORY_TIMEZONE", "Asia/Tokyo")
    create_daily_portfolio_snapshot({"balance": 1}, timestamp=datetime(2026, 1, 1))
    assert trading_history.snapshots[0].timestamp.utcoffset() == timedelta(hours=9)


# ---- the plugin


def test_the_plugin_imports_nothing_for_those_who_do_not_use_it() -> None:
    """Every run of pytest in the environment loads it."""
    script = (
        "import pytest, sys; had = set(sys.modules); import producers.pytest_plugin; print(*set(sys.modules) - had)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert set(loaded.stdout.split()) == {"producers", "producers.pytest_plugin"}


def test_without_fakeredis_the_fixture_says_what_to_install(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, in the test that asked for it."""
    monkeypatch.setitem(sys.modules, "fakeredis", None)
    for module in ("producers.testing", "producers.child_environment"):
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(pytest.fail.Exception, match=re.escape(": pip install '.[testing]' in a clone")):
        request.getfixturevalue("trading_history")


def test_a_test_that_changes_our_variables_leaves_them_as_they_were(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its monkeypatch is undone after the fixture, and must not put back what the fixture had set."""
    monkeypatch.setenv("REDIS_URL", "redis://mine")
    pytester.makepyfile("""
        import os
        def test_first(trading_history, monkeypatch): monkeypatch.setenv("REDIS_URL", "redis://other")
        def test_second(): assert os.environ["REDIS_URL"] == "redis://mine"
    """)
    pytester.runpytest_inprocess().assert_outcomes(passed=2)


def test_a_test_that_undoes_its_monkeypatch_stays_redirected_and_leaves_all_as_it_was(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment had, and what it had not, so that .env would count again."""
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

"""The coroutines of producers.aio: what they record, their errors, and an event loop that is never blocked."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest
from fakeredis import FakeRedis
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from producers import trading_controller
from producers.aio import archive_current_signals, create_daily_portfolio_snapshot
from producers.errors import EventRejected, InvalidEvent, OutboxError
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.testing import FakeHistory
from tests.forking import in_child

T = TypeVar("T")
CYCLE = datetime(2026, 11, 22, 18, 2, 46, tzinfo=UTC)


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in an event loop of a thread, since other tests may leave a loop running in the main thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def test_a_snapshot_and_an_archive_are_recorded_and_stored(trading_history: FakeHistory) -> None:
    async def cycle() -> tuple[int, int]:
        snapshot = await create_daily_portfolio_snapshot({"balance": 9900.12}, 1, timestamp=CYCLE)
        archive = await archive_current_signals([{"market_id": "1"}], portfolio_id=1, archived_at=CYCLE)
        assert archive is not None
        trading_history.work()
        return await snapshot.stored(5), await archive.stored(5)

    assert _run(cycle()) == (1, 1)
    trading_history.assert_snapshot(balance=9900.12, portfolio_id=1, timestamp=CYCLE)
    trading_history.assert_archive(portfolio_id=1, archived_at=CYCLE)


def test_a_receipt_equals_the_one_of_the_blocking_call(trading_history: FakeHistory) -> None:
    """Both record the same event; only the sequence differs."""
    receipt = _run(create_daily_portfolio_snapshot({"balance": 1}, timestamp=CYCLE))
    other = trading_controller.create_daily_portfolio_snapshot({"balance": 1}, timestamp=CYCLE)
    assert (receipt.event_id, receipt.source, receipt.sequence + 1) == (other.event_id, other.source, other.sequence)


def test_the_trace_context_is_the_argument_or_the_one_of_the_task(tmp_path: Path) -> None:
    """The thread that makes the calls has OpenTelemetry's context of the task that awaits them."""
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    span = NonRecordingSpan(SpanContext(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, False, TraceFlags(1)))

    async def cycle(producer: HistoryProducer) -> None:
        with use_span(span):
            await create_daily_portfolio_snapshot({"balance": 1}, producer=producer)
            await archive_current_signals([{}], producer=producer, traceparent=given)
        await create_daily_portfolio_snapshot({"balance": 2}, producer=producer)
        await create_daily_portfolio_snapshot({"balance": 3}, producer=producer, traceparent=given)

    outbox = tmp_path / "outbox.db"
    with HistoryProducer(FakeRedis(), outbox=outbox) as producer, Outbox(outbox) as recorded:
        _run(cycle(producer))
        found = [json.loads(entry.event).get("traceparent") for entry in recorded.entries()]
        producer.close(0)
    assert found == ["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", given, None, given]


def test_no_signals_give_no_receipt(trading_history: FakeHistory) -> None:
    assert _run(archive_current_signals([])) is None


def test_bad_input_raises_the_error_of_the_blocking_call(trading_history: FakeHistory) -> None:
    with pytest.raises(InvalidEvent, match="must have 'balance'"):
        _run(create_daily_portfolio_snapshot({"ballance": 1}))


def test_a_rejected_event_raises_its_reason(trading_history: FakeHistory) -> None:
    async def cycle() -> None:
        receipt = await create_daily_portfolio_snapshot({"balance": 1})
        trading_history.work(reject="balance: is not plausible")
        await receipt.stored(5)

    with pytest.raises(EventRejected, match="balance: is not plausible"):
        _run(cycle())


def test_without_an_outcome_the_wait_ends_after_its_timeout(trading_history: FakeHistory) -> None:
    async def cycle() -> None:
        receipt = await create_daily_portfolio_snapshot({"balance": 1})
        await receipt.stored(0.05)

    with pytest.raises(TimeoutError, match=r"was not acknowledged within 0\.05 s; it stays in the outbox"):
        _run(cycle())


def test_a_wait_ends_when_a_worker_stores_the_event_later(trading_history: FakeHistory) -> None:
    async def cycle() -> int:
        receipt = await create_daily_portfolio_snapshot({"balance": 1})
        waiting = asyncio.create_task(receipt.stored(5))
        await asyncio.sleep(0)
        assert not waiting.done()
        await asyncio.to_thread(trading_history.work)
        return await waiting

    assert _run(cycle()) == 1


def test_no_task_is_left_when_the_last_wait_has_ended(trading_history: FakeHistory) -> None:
    """The next wait starts a new task."""

    async def cycle(balance: int) -> int:
        receipt = await create_daily_portfolio_snapshot({"balance": balance})
        trading_history.work()
        row_id = await receipt.stored(5)
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.001)
        return row_id

    async def cycles() -> list[int]:
        return [await cycle(balance) for balance in (1, 2)]

    assert _run(cycles()) == [1, 2]


def test_calls_are_recorded_in_the_order_in_which_they_were_started(trading_history: FakeHistory) -> None:
    moments = [CYCLE + timedelta(seconds=number) for number in range(20)]

    async def cycles() -> list[int]:
        calls = [create_daily_portfolio_snapshot({"balance": 1}, timestamp=moment) for moment in moments]
        return [receipt.sequence for receipt in await asyncio.gather(*calls)]

    sequences = _run(cycles())
    assert sequences == sorted(sequences)
    assert [snapshot.timestamp for snapshot in trading_history.snapshots] == moments


def test_the_loop_runs_while_a_call_waits_for_the_outbox(tmp_path: Path) -> None:
    """Another connection has locked the outbox: the call waits, and the loop runs other tasks."""
    outbox = tmp_path / "outbox.db"

    async def cycle(producer: HistoryProducer) -> int:
        await create_daily_portfolio_snapshot({"balance": 1}, producer=producer)
        with closing(sqlite3.connect(outbox, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = asyncio.create_task(create_daily_portfolio_snapshot({"balance": 2}, producer=producer))
            for _ in range(100):
                await asyncio.sleep(0.001)
            assert not waiting.done()
            other.execute("COMMIT")
        return (await waiting).sequence

    with HistoryProducer(FakeRedis(), outbox=outbox) as producer:
        assert _run(cycle(producer)) == 2
        producer.close(0)


def test_a_wait_ends_after_its_timeout_while_a_call_reads_a_slow_url(trading_history: FakeHistory) -> None:
    """Only calls wait for it; one that is cancelled leaves the waits alone."""

    async def cycle(url: str) -> float:
        receipt = await create_daily_portfolio_snapshot({"balance": 1})
        slow = asyncio.create_task(archive_current_signals(signals_url=url))
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await receipt.stored(0.3)
        took = time.monotonic() - began
        trading_history.work()
        assert await receipt.stored(0.3) == 1
        assert not slow.done()
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert await receipt.stored(0.3) == 1
        return took

    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        assert _run(cycle(f"http://127.0.0.1:{server.getsockname()[1]}/")) < 2


def test_a_call_records_the_values_at_its_first_step(tmp_path: Path) -> None:
    """The thread that writes is busy; meanwhile, the caller changes the objects that it has passed."""
    portfolio: dict[str, Any] = {"balance": 100, "positions": []}
    signals: list[dict[str, Any]] = [{"market_id": "1", "prices": {"yes": [1]}}]
    outbox = tmp_path / "outbox.db"

    async def cycle(producer: HistoryProducer) -> datetime:
        await create_daily_portfolio_snapshot({"balance": 1}, timestamp=CYCLE, producer=producer)
        with closing(sqlite3.connect(outbox, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            snapshot = asyncio.create_task(create_daily_portfolio_snapshot(portfolio, producer=producer))
            archive = asyncio.create_task(archive_current_signals(signals, producer=producer))
            await asyncio.sleep(0)
            started = datetime.now(UTC)
            portfolio["balance"] = 40
            portfolio["positions"].append({"status": "open"})
            signals[0]["prices"]["yes"].append(2)
            signals.append({"market_id": "2"})
            await asyncio.sleep(0.05)
            other.execute("COMMIT")
        await asyncio.gather(snapshot, archive)
        return started

    with HistoryProducer(FakeRedis(), outbox=outbox) as producer, Outbox(outbox) as recorded:
        started = _run(cycle(producer))
        _, snapshot, archive = (json.loads(entry.event)["data"] for entry in recorded.entries())
        producer.close(0)
    assert (snapshot["balance"], snapshot["open_positions"]) == ("100", 0)
    assert archive["signals"] == [{"market_id": "1", "prices": {"yes": [1]}}]
    assert all(datetime.fromisoformat(time) <= started for time in (snapshot["timestamp"], archive["archived_at"]))


def test_many_waiting_receipts_are_read_together(trading_history: FakeHistory) -> None:
    """One thread reads the outcomes of all receipts; the event loop is not called once for each of them."""
    calls = 0

    async def cycle() -> list[int | BaseException]:
        nonlocal calls
        receipts = [await create_daily_portfolio_snapshot({"balance": number + 1}, number) for number in range(50)]
        waiting = [asyncio.create_task(receipt.stored(0.3)) for receipt in receipts]
        loop = asyncio.get_running_loop()
        run_in_executor = loop.run_in_executor

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return run_in_executor(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "run_in_executor", counted)
            return await asyncio.gather(*waiting, return_exceptions=True)

    assert {type(outcome) for outcome in _run(cycle())} == {TimeoutError}
    assert 1 <= calls < 20


def test_a_timeout_that_is_not_a_number_is_an_error(trading_history: FakeHistory) -> None:
    """The wait would never end."""

    async def cycle() -> None:
        receipt = await create_daily_portfolio_snapshot({"balance": 1})
        with pytest.raises(ValueError, match="timeout: must be a number of seconds, not NaN"):
            receipt.wait(float("nan"))
        await receipt.stored(float("nan"))

    with pytest.raises(ValueError, match="timeout: must be a number of seconds, not NaN"):
        _run(cycle())
    with pytest.raises(ValueError, match="timeout"):
        trading_history.producer.flush(float("nan"))


def test_a_cancelled_wait_leaves_the_others(trading_history: FakeHistory) -> None:
    async def cycle() -> int:
        receipt = await create_daily_portfolio_snapshot({"balance": 1})
        cancelled, other = (asyncio.create_task(receipt.stored(5)) for _ in range(2))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        await asyncio.to_thread(trading_history.work)
        row_id = await other
        assert cancelled.cancelled()
        return row_id

    assert _run(cycle()) == 1


def test_an_outbox_that_cannot_be_read_ends_all_waits_with_its_error(
    trading_history: FakeHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise OutboxError("outbox.db: Input/output error")

    async def cycle() -> list[BaseException | int]:
        receipts = [await create_daily_portfolio_snapshot({"balance": number}) for number in range(2)]
        waits = [asyncio.create_task(receipt.stored(60)) for receipt in receipts]
        await asyncio.sleep(0.02)
        monkeypatch.setattr(Outbox, "statuses_of", fail)
        return await asyncio.gather(*waits, return_exceptions=True)

    assert [str(error) for error in _run(cycle())] == ["outbox.db: Input/output error"] * 2


def test_waits_end_when_the_task_that_reads_for_them_is_cancelled(trading_history: FakeHistory) -> None:
    """A program may cancel all tasks that it does not know. A later wait has its own task again."""

    async def cycle() -> int:
        receipt = await create_daily_portfolio_snapshot({"balance": 1})
        waits = {asyncio.create_task(receipt.stored(60)) for _ in range(2)}
        await asyncio.sleep(0.02)
        for task in asyncio.all_tasks() - waits - {asyncio.current_task()}:
            task.cancel()
        await asyncio.wait(waits, timeout=10)
        assert [wait.cancelled() for wait in waits] == [True, True]
        await asyncio.to_thread(trading_history.work)
        return await receipt.stored(5)

    assert _run(cycle()) == 1


def test_a_forked_child_records_with_its_own_thread(trading_history: FakeHistory) -> None:
    _run(create_daily_portfolio_snapshot({"balance": 1}, timestamp=CYCLE))

    def child() -> None:
        assert _run(create_daily_portfolio_snapshot({"balance": 2})).sequence == 2

    assert in_child(child) == 0

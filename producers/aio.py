"""The two producer calls as coroutines, and a receipt that can be awaited, for controllers that use asyncio.

A call syncs a file to disk, which would block the event loop. Here a call makes the event at its first step, in the
event loop, so it records the values that its arguments have then. One thread of the process writes the events, in the
order in which the calls were started, and the event loop runs meanwhile. Another thread reads the outcomes of all
receipts that are awaited, so `stored` does not wait for a call.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from producers import history_producer
from producers.current_signals import read_signals
from producers.entries import Accepted
from producers.events import Payload, SignalArchive
from producers.history_producer import HistoryProducer
from producers.json_values import with_builtins
from producers.redirection import Redirection, active_redirection
from producers.times import deadline_after
from producers.trading_controller import cycle_time, shared_producer, snapshot_of, zone_of
from producers.transport import Transport, late

T = TypeVar("T")

_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.5

_Task = Literal["record", "wait"]
_executors: dict[tuple[Redirection | None, _Task], ThreadPoolExecutor] = {}


class Receipt(history_producer.Receipt):
    """Proof that an event is durable, with an outcome that can be awaited."""

    async def stored(self, timeout: float | None = None) -> int:
        """Return the row id once the event is stored; `timeout` in seconds, None waits without limit.

        Raises:
            EventRejected: the event was rejected.
            TimeoutError: no outcome is known yet; the event is safe in the outbox and is retried.
            OutboxError: the outbox cannot be read, or its entry was settled so long ago that it is no longer kept.
        """
        deadline = deadline_after(timeout)
        key = asyncio.get_running_loop(), self._transport
        poll = _polls.get(key)
        if poll is None:
            poll = _polls[key] = _Poll(self._transport)
        return await poll.outcome(self._accepted, timeout, math.inf if deadline is None else deadline)


class _Wait(NamedTuple):
    """One wait for an outcome. `deadline` is a time of the monotonic clock."""

    accepted: Accepted
    timeout: float | None
    deadline: float


class _Poll:
    """Reads the outcomes of one outbox for all waits of one event loop, together, until none is left."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._waits: dict[asyncio.Future[int], _Wait] = {}
        self._added = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def outcome(self, accepted: Accepted, timeout: float | None, deadline: float) -> int:
        """Return the row id of one event; see `Receipt.stored`."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waits[future] = _Wait(accepted, timeout, deadline)
        self._added.set()
        try:
            return await future
        finally:
            self._waits.pop(future, None)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        try:
            while self._waits:
                waits = list(self._waits.items())
                read_at = time.monotonic()
                read = partial(self._transport.outcomes, [wait.accepted for _, wait in waits])
                for (future, wait), outcome in zip(waits, await _in_thread("wait", read), strict=True):
                    is_late = outcome is None and wait.deadline <= read_at
                    self._end(future, late(wait.accepted, wait.timeout) if is_late else outcome)
                pause = await self._pause(pause)
        except Exception as error:
            for future in list(self._waits):
                self._end(future, error)
        finally:
            for future in self._waits:  # the task was cancelled
                future.cancel()
            _polls.pop((asyncio.get_running_loop(), self._transport), None)

    def _end(self, future: asyncio.Future[int], outcome: int | Exception | None) -> None:
        """End a wait with its outcome. Do nothing if the outcome is not known yet (None) or the wait was cancelled."""
        if outcome is None or future.done():
            return
        del self._waits[future]
        if isinstance(outcome, int):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)

    async def _pause(self, seconds: float) -> float:
        """Pause until the next deadline, at most `seconds`. A new wait ends a long pause. Return the next pause."""
        end = time.monotonic() + seconds
        end = min([end, *(wait.deadline for wait in self._waits.values())])
        await asyncio.sleep(min(end - time.monotonic(), _FIRST_PAUSE_SECONDS))
        try:
            await asyncio.wait_for(self._added.wait(), end - time.monotonic())
        except TimeoutError:
            return min(2 * seconds, _LONGEST_PAUSE_SECONDS)
        self._added.clear()
        return _FIRST_PAUSE_SECONDS


_polls: dict[tuple[asyncio.AbstractEventLoop, Transport], _Poll] = {}


def _forget_after_fork() -> None:
    # The threads and the tasks of the parent do not exist in the child.
    _executors.clear()
    _polls.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


async def create_daily_portfolio_snapshot(
    portfolio_data: Mapping[str, Any],
    portfolio_id: int | None = None,
    *,
    timestamp: datetime | None = None,
    producer: HistoryProducer | None = None,
    traceparent: str | None = None,
) -> Receipt:
    """Record a snapshot like `producers.trading_controller.create_daily_portfolio_snapshot`, without blocking the loop.

    A call that is cancelled may have recorded the event.
    """
    snapshot = snapshot_of(portfolio_data, portfolio_id, timestamp, zone_of(producer))
    return _awaitable(await _in_thread("record", partial(_record, snapshot, producer, traceparent)))


async def archive_current_signals(
    signals: list[dict[str, Any]] | Mapping[str, Any] | None = None,
    *,
    signals_path: Path | str = "data/trades/current_signals.json",
    signals_url: str | None = None,
    portfolio_id: int | None = None,
    archived_at: datetime | None = None,
    producer: HistoryProducer | None = None,
    traceparent: str | None = None,
) -> Receipt | None:
    """Archive signals like `producers.trading_controller.archive_current_signals`, without blocking the loop.

    A call that is cancelled may have recorded the event. Later calls wait for one that reads `signals_url`.
    """
    moment = cycle_time("archived_at", archived_at, zone_of(producer))

    def archive_of() -> SignalArchive | None:
        found = read_signals(signals, signals_url=signals_url, signals_path=Path(signals_path))
        if not found:
            return None
        archive = SignalArchive.checked(archived_at=moment, signals=found, portfolio_id=portfolio_id)
        return archive.model_copy(update={"signals": with_builtins(archive.signals)})

    def record(given: SignalArchive | None = None) -> history_producer.Receipt | None:
        archive = given or archive_of()
        return None if archive is None else _record(archive, producer, traceparent)

    if signals is None:
        receipt = await _in_thread("record", record)
    else:
        archive = archive_of()
        receipt = None if archive is None else await _in_thread("record", partial(record, archive))
    return None if receipt is None else _awaitable(receipt)


def _record(payload: Payload, producer: HistoryProducer | None, traceparent: str | None) -> history_producer.Receipt:
    return (producer or shared_producer()).record(payload, traceparent=traceparent)


def _awaitable(receipt: history_producer.Receipt) -> Receipt:
    return Receipt(*(getattr(receipt, one.name) for one in fields(receipt)))


async def _in_thread(task: _Task, call: Callable[[], T]) -> T:
    context = copy_context()  # OpenTelemetry's current span is in it
    return await asyncio.get_running_loop().run_in_executor(_executor(task), context.run, call)


def _executor(task: _Task) -> ThreadPoolExecutor:
    redirection = active_redirection()
    key = redirection, task
    if key not in _executors:
        _executors[key] = ThreadPoolExecutor(1, thread_name_prefix=f"trading-history-aio-{task}")
        if redirection is not None:  # a test's producers must not be used by a thread that outlives the test
            redirection.at_end(lambda: _executors.pop(key).shutdown())
    return _executors[key]

"""The two producer calls as coroutines, and a receipt that can be awaited, for controllers that use asyncio.

A call syncs a file to disk, which would block the event loop. Here one thread of the process makes the calls, in the
order in which they were started, and the event loop runs meanwhile. Another thread reads the outcomes of receipts, so
`stored` does not wait for a call.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from producers import history_producer, trading_controller
from producers.history_producer import HistoryProducer
from producers.redirection import Redirection, active_redirection

T = TypeVar("T")

_FIRST_POLL_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.5

_Task = Literal["record", "wait"]
_executors: dict[tuple[Redirection | None, _Task], ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_executors.clear)  # a thread of the parent does not exist in the child


class Receipt(history_producer.Receipt):
    """Proof that an event is durable, with an outcome that can be awaited."""

    async def stored(self, timeout: float | None = None) -> int:
        """Return the row id once the event is stored; `timeout` in seconds, None waits without limit.

        Raises:
            EventRejected: the event was rejected.
            TimeoutError: no outcome is known yet; the event is safe in the outbox and is retried.
            OutboxError: the outbox cannot be read, or its entry was settled so long ago that it is no longer kept.
        """
        started, pause = time.monotonic(), _FIRST_POLL_SECONDS
        while True:
            try:
                return await _in_thread("wait", partial(self.wait, 0))
            except TimeoutError:
                waited = time.monotonic() - started
                if timeout is not None and waited >= timeout:
                    raise TimeoutError(
                        f"event {self.event_id} was not acknowledged within {timeout} s;"
                        " it stays in the outbox and is retried"
                    ) from None
            await asyncio.sleep(pause if timeout is None else min(pause, timeout - waited))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


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
    call = partial(
        trading_controller.create_daily_portfolio_snapshot,
        portfolio_data,
        portfolio_id,
        timestamp=timestamp,
        producer=producer,
        traceparent=traceparent,
    )
    return _awaitable(await _in_thread("record", call))


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
    call = partial(
        trading_controller.archive_current_signals,
        signals,
        signals_path=signals_path,
        signals_url=signals_url,
        portfolio_id=portfolio_id,
        archived_at=archived_at,
        producer=producer,
        traceparent=traceparent,
    )
    receipt = await _in_thread("record", call)
    return None if receipt is None else _awaitable(receipt)


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

"""Tests of a controller: the real producer, outbox and relay on fakeredis, without any server.

pytest has the fixture `trading_history`. Without pytest, `with FakeHistory() as trading_history:` does the same. Both
need the extra `testing`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar

from fakeredis import FakeRedis, FakeServer
from redis import Redis, RedisError

from producers.acknowledgements import Outcome
from producers.child_environment import redirected_children
from producers.errors import HistoryError
from producers.events import KINDS, Event, PortfolioSnapshot, SignalArchive, decode, encode, event_of
from producers.fake_worker import Answer, FakeWorker, Rejection
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.redirection import Redirection, activate
from producers.redis_keys import delivery_of
from producers.trading_controller import shared_producer

AnyPayload = TypeVar("AnyPayload", PortfolioSnapshot, SignalArchive)

_QUEUE = "history"
_EXIT_SECONDS = 0.2  # shorter than in production: most tests have no worker whose acknowledgements would arrive
_LAST_BACKOFF_SECONDS = 0.05  # shorter than in production: after redis_down(), a test continues at once
_POLL_SECONDS = 0.005
_POLLS = 2000  # a number, not a time, because a test may have stopped the clock
_SHOWN_PAYLOADS = 10


@contextmanager
def redirect(redis: Redis, outbox: Path, *, queue: str = _QUEUE) -> Iterator[None]:
    """Make every HistoryProducer of this process record to `outbox` and send to `queue` on `redis`, in the block.

    This applies to the shared producer, to producers that exist already, and to those that are made in the block,
    whatever Redis, outbox and queue they name. `.env` is not read. Child processes that are started in the block record
    to the same outbox and have no Redis: this process sends their events. Processes that were started before the block,
    such as those of a pool, are not redirected.

    At the end of the block, the producers made in it are closed, and the others work as before. A thread that was
    started in the block and outlives it gets HistoryError when it records outside of a block. Join such threads in the
    test: a thread that they start after the block is not known and records for real.

    Raises:
        HistoryError: producers of this process are redirected already.
    """
    with (
        redirected_children(outbox, queue),
        activate(
            Redirection(redis, outbox, queue, exit_seconds=_EXIT_SECONDS, last_backoff_seconds=_LAST_BACKOFF_SECONDS)
        ),
    ):
        yield


class FakeHistory:
    """Redirects all producers of this process to a temporary outbox and a fake Redis; see `redirect`.

    Use it as a context manager. Only one can be open in a process.

    Raises:
        HistoryError: another one is open (raised on entering).
    """

    def __init__(self) -> None:
        self._server = FakeServer()
        self.redis = FakeRedis(server=self._server)
        self._worker = FakeWorker(self.redis, _QUEUE)
        self._pid = os.getpid()
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            path = Path(stack.enter_context(TemporaryDirectory(prefix="trading-history-")), "outbox.db")
            self._outbox = stack.enter_context(Outbox(path))
            stack.enter_context(redirect(self.redis, path))
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def producer(self) -> HistoryProducer:
        """The shared producer, which calls without `producer` use."""
        return shared_producer()

    @property
    def events(self) -> list[Event]:
        """All recorded events, in order, as workers receive them: amounts and decimals in signals are `Decimal`."""
        return [decode(entry.event, KINDS[entry.type].model) for entry in self._outbox.entries()]

    @property
    def snapshots(self) -> list[PortfolioSnapshot]:
        """The recorded portfolio snapshots, in order."""
        return [event.data for event in self.events if isinstance(event.data, PortfolioSnapshot)]

    @property
    def archives(self) -> list[SignalArchive]:
        """The recorded signal archives, in order."""
        return [event.data for event in self.events if isinstance(event.data, SignalArchive)]

    def assert_snapshot(self, **fields: Any) -> PortfolioSnapshot:
        """Return the newest snapshot with these values. Floats are rounded as they are when recorded.

        Raises:
            AssertionError: there is no such snapshot; the message shows the recorded ones.
            InvalidEvent: a snapshot cannot have such a value.
            TypeError: a snapshot has no such field.
        """
        __tracebackhide__ = True
        return _newest(self.snapshots, PortfolioSnapshot, fields)

    def assert_archive(self, **fields: Any) -> SignalArchive:
        """Return the newest archive with these values. Raises the same errors as `assert_snapshot`."""
        __tracebackhide__ = True
        return _newest(self.archives, SignalArchive, fields)

    @contextmanager
    def redis_down(self) -> Iterator[None]:
        """Make Redis unreachable in the block. Events that are recorded in it are sent after it."""
        connected = self._server.connected
        self._server.connected = False
        try:
            yield
        finally:
            self._server.connected = connected

    def work(self, *, reject: Rejection | None = None) -> list[Outcome]:
        """Process all recorded events as a worker does. When this returns, all receipts have an outcome.

        Each event is validated. It is stored, with row ids from 1 in each table; or a duplicate, if it is stored
        already; or rejected, if it is stored already with other content.

        Args:
            reject: A reason with which all events are rejected, or a function of an event that returns a reason, or
                None for an event that is to be stored.

        Returns:
            One outcome per delivery, in order.

        Raises:
            HistoryError: Redis is down, or this is a forked child: its parent delivers the events.
            TimeoutError: the relay did not deliver within 10 s; its log says why.
        """
        self._refuse_child()
        if not self._server.connected:
            raise HistoryError("Redis is down: call work() after the block of redis_down()")
        self.producer.flush(0)  # starts a relay, if the producers that recorded the events are closed
        _until(lambda: not self._outbox.pending_count(), "events did not reach Redis")
        answers = self._worker.work(reject)
        _until(lambda: self._are_known(answers), "outcomes did not reach the outbox")
        return [answer.outcome for answer in answers]

    @contextmanager
    def worker(self, *, reject: Rejection | None = None) -> Iterator[None]:
        """Run a worker during the block, for code that waits for its own receipts; see `work`."""
        self._refuse_child()
        stop = threading.Event()

        def run() -> None:
            ending = False
            while not ending:
                ending = stop.wait(_POLL_SECONDS)
                with suppress(RedisError):  # raised in redis_down(); the next round tries again
                    self._worker.work(reject)

        with ThreadPoolExecutor(1, "history-fake-worker") as pool:
            ended = pool.submit(run)
            try:
                yield
            finally:
                stop.set()
            ended.result()

    def _refuse_child(self) -> None:
        if os.getpid() != self._pid:
            raise HistoryError("this is a forked child: call work() or worker() in its parent")

    def _are_known(self, answers: Sequence[Answer]) -> bool:
        return all(self._outbox.deliveries.is_settled(delivery_of(one.job_id)) for one in answers)


def _until(condition: Callable[[], bool], problem: str) -> None:
    for _ in range(_POLLS):
        if condition():
            return
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(  # pragma: no cover - after 10 s
        f"{problem} within {_POLLS * _POLL_SECONDS:.0f} s; the log of producers.relay says why"
    )


def _newest(recorded: Sequence[AnyPayload], model: type[AnyPayload], fields: Mapping[str, Any]) -> AnyPayload:
    __tracebackhide__ = True
    if unknown := fields.keys() - model.model_fields.keys():
        raise TypeError(f"{model.__name__} has no field {', '.join(sorted(unknown))}")
    for payload in reversed(recorded):
        if _with(payload, fields) == payload:
            return payload
    shown = [
        f"\n  {', '.join(f'{name}={getattr(payload, name)!r}' for name in fields)}"
        for payload in recorded[-_SHOWN_PAYLOADS:]
    ]
    wanted = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    raise AssertionError(
        f"no {model.__name__} with {wanted or 'any values'} among the {len(recorded)} recorded:{''.join(shown)}"
        if recorded
        else f"no {model.__name__} was recorded"
    )


def _with(payload: AnyPayload, fields: Mapping[str, Any]) -> AnyPayload:
    """Return `payload` as it would have been recorded with these values."""
    own = {name: getattr(payload, name) for name in type(payload).model_fields}
    event = event_of(type(payload).checked(**{**own, **fields}), source="expected", sequence=None)
    # Encode and decode it, because a float in a signal becomes a Decimal on the way.
    return decode(encode(event), type(event)).data  # type: ignore[return-value]  # decode returns the same kind of payload

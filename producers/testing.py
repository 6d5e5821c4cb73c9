"""For the tests of a controller: the real producer, outbox and relay on fakeredis, without any server.

Needs `trading-history[testing]`. With pytest it is the fixture `trading_history`; elsewhere
`with FakeHistory() as history:` does the same.
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
from producers.fake_worker import Answer, FakeWorker, Refusal
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.redirection import Redirection, activate
from producers.redis_keys import delivery_of
from producers.trading_controller import shared_producer

AnyPayload = TypeVar("AnyPayload", PortfolioSnapshot, SignalArchive)

_QUEUE = "history"
_EXIT_SECONDS = 0.2  # most tests close their producers without a worker, for which a real one waits longer
_LAST_BACKOFF_SECONDS = 0.05  # a test does not wait seconds for the end of an outage to be noticed
_POLL_SECONDS = 0.005
_POLLS = 2000  # counted, not timed: a test may have stopped the clock
_SHOWN_PAYLOADS = 10


@contextmanager
def redirect(redis: Redis, outbox: Path, *, queue: str = _QUEUE) -> Iterator[None]:
    """In the block, every HistoryProducer of this process records to `outbox` and relays to `queue` on `redis`.

    That is: the one that calls without `producer` share; those made in the block, whatever Redis, outbox and queue they
    name; and those made before. `.env` is not read. Child processes that are started in the block find no Redis; their
    events go to the same outbox, and this process relays them. Processes of a pool that were started before are not
    redirected: make such a pool anew in the test.

    At the end, producers made in the block are closed, and the others are as before. A thread that was started in the
    block and outlives it gets HistoryError when it records outside of such a block. End it in the test all the same:
    a thread that it starts later is not known, and records for real.

    Raises:
        HistoryError: on entering, when producers of this process are redirected already.
    """
    with (
        redirected_children(outbox, queue),
        activate(
            Redirection(redis, outbox, queue, exit_seconds=_EXIT_SECONDS, last_backoff_seconds=_LAST_BACKOFF_SECONDS)
        ),
    ):
        yield


class FakeHistory:
    """A history that records for real, up to a fake Redis: while it is open, all producers are redirected to it.

    See `redirect`. One at a time in a process.

    Raises:
        HistoryError: on entering, when another one is open.
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
        """The one that calls without `producer` share."""
        return shared_producer()

    @property
    def events(self) -> list[Event]:
        """All recorded events, in order, as workers get them: amounts and numbers in signals are Decimals."""
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
        """The newest snapshot that has these values; they are rounded as recording does, so floats will do.

        Raises:
            AssertionError: there is none; the message shows the recorded ones.
            InvalidEvent: no snapshot can have such a value.
        """
        __tracebackhide__ = True
        return _newest(self.snapshots, PortfolioSnapshot, fields)

    def assert_archive(self, **fields: Any) -> SignalArchive:
        """The newest archive that has these values; raises what `assert_snapshot` raises."""
        __tracebackhide__ = True
        return _newest(self.archives, SignalArchive, fields)

    @contextmanager
    def redis_down(self) -> Iterator[None]:
        """Redis cannot be reached in the block; what is recorded there is delivered after it."""
        connected = self._server.connected
        self._server.connected = False
        try:
            yield
        finally:
            self._server.connected = connected

    def work(self, *, reject: Refusal | None = None) -> list[Outcome]:
        """Do a worker's part for all recorded events; receipts know their outcome when this returns.

        Each event is checked as a worker does. It is stored, with row ids from 1 in each table, or a duplicate when
        the same fact is stored already, or rejected when that has other content. `reject` is a reason to reject
        everything, or a function that returns an event's reason, None for one that is to be stored.

        Raises:
            HistoryError: Redis is down, or this is a forked child, whose events its parent delivers.
            TimeoutError: the relay did not deliver; its log says why.
        """
        self._refuse_child()
        if not self._server.connected:
            raise HistoryError("Redis is down: no worker has anything to do")
        self.producer.flush(0)  # the producers that recorded may be closed: this one relays their entries
        _until(lambda: not self._outbox.pending_count(), "events did not reach Redis")
        answers = self._worker.work(reject)
        _until(lambda: self._are_known(answers), "outcomes did not reach the outbox")
        return [answer.outcome for answer in answers]

    @contextmanager
    def worker(self, *, reject: Refusal | None = None) -> Iterator[None]:
        """Run a worker in the block, for code that waits for its own receipts; see `work`."""
        self._refuse_child()
        stop = threading.Event()

        def run() -> None:
            ending = False
            while not ending:
                ending = stop.wait(_POLL_SECONDS)
                with suppress(RedisError):  # down for now
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
            raise HistoryError("this is a forked child: its parent delivers what it records")

    def _are_known(self, answers: Sequence[Answer]) -> bool:
        return all(self._outbox.deliveries.is_settled(delivery_of(one.job_id)) for one in answers)


def _until(condition: Callable[[], bool], problem: str) -> None:
    for _ in range(_POLLS):
        if condition():
            return
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"{problem} within {_POLLS * _POLL_SECONDS:.0f} s; the log of producers.relay says why")


def _newest(recorded: Sequence[AnyPayload], model: type[AnyPayload], fields: Mapping[str, Any]) -> AnyPayload:
    __tracebackhide__ = True
    if unknown := fields.keys() - model.model_fields.keys():
        raise TypeError(f"{model.__name__} has no {', '.join(sorted(unknown))}")
    for payload in reversed(recorded):
        if _with(payload, fields) == payload:
            return payload
    shown = [
        f"\n  {', '.join(f'{name}={getattr(payload, name)!r}' for name in fields)}"
        for payload in recorded[-_SHOWN_PAYLOADS:]
    ]
    wanted = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    raise AssertionError(
        f"no {model.__name__} with {wanted or 'any values'} was recorded, but {len(recorded)}:{''.join(shown)}"
        if recorded
        else f"no {model.__name__} was recorded"
    )


def _with(payload: AnyPayload, fields: Mapping[str, Any]) -> AnyPayload:
    """`payload` as it would have been recorded with these values instead of its own."""
    own = {name: getattr(payload, name) for name in type(payload).model_fields}
    event = event_of(type(payload).checked(**{**own, **fields}), source="expected", sequence=None)
    # Over the wire: a float in a signal comes back as the Decimal that it is there.
    return decode(encode(event), type(event)).data  # type: ignore[return-value]  # the event's payload is of its kind

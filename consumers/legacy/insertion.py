"""Inserts the events of an import by the worker's own processing of a batch; what cannot be decided now is retried."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from consumers.db.engine import drop_connections
from consumers.errors import PoisonEvent, StoreUnavailable
from consumers.worker.batch import Deferred, process_batch
from consumers.worker.deliveries import Delivery
from producers.acknowledgements import Outcome
from producers.times import backoff_seconds

_BATCH_CHARACTERS = 4 * 1024 * 1024
_MOST_DEFERRED = 1000
_MOST_FAILURES = 3  # as many as a worker tries
_FIRST_BACKOFF_SECONDS = 0.2
_LAST_BACKOFF_SECONDS = 5.0

_Answer = TypeVar("_Answer")


def when_available(work: Callable[[], _Answer], say: Callable[[str], None]) -> _Answer:
    """The answer of `work`, which is called again, after growing pauses, while the database cannot take it."""
    failures = 0
    while True:
        try:
            answer = work()
        except StoreUnavailable as error:
            failures += 1
            if failures == 1:
                say(f"waiting for the database: {error}")
            drop_connections()
            time.sleep(backoff_seconds(failures, first=_FIRST_BACKOFF_SECONDS, last=_LAST_BACKOFF_SECONDS))
        else:
            if failures:
                say("the database is back, going on")
            return answer


@dataclass
class _Undecided:
    """An event to insert; `failures` counts the defects that it met alone."""

    delivery: Delivery
    failures: int = 0


class Insertion:
    """Decides deliveries, and calls `decided` with the job id and outcome of each once that is committed.

    A delivery that alone cannot be decided now waits for the others; after a few defects it is rejected as poison.
    """

    def __init__(self, *, decided: Callable[[str, Outcome], None], say: Callable[[str], None]) -> None:
        self._decided = decided
        self._say = say
        self._deferred: dict[str, _Undecided] = {}

    def insert(self, deliveries: Iterable[Delivery]) -> None:
        """Decide them, but for a few that are deferred. Outages of the database are waited for."""
        for batch in _batches(deliveries):
            when_available(lambda batch=batch: self._process(batch), self._say)  # type: ignore[misc]  # wants a type
            self._deferred |= batch
        if len(self._deferred) > _MOST_DEFERRED:
            self.finish()

    def finish(self) -> None:
        """Decide what was deferred, however long that takes."""
        while self._deferred:
            when_available(lambda: self._process(self._deferred, last=True), self._say)

    def _process(self, batch: dict[str, _Undecided], *, last: bool = False) -> None:
        """Leave in `batch` what is deferred.

        Raises:
            StoreUnavailable: the database decides nothing of it now. One delivery alone is deferred instead, so that it
                does not hold up others, unless these are the `last`.
        """
        decided = False
        waiting: list[StoreUnavailable] = []
        for results in process_batch([one.delivery for one in batch.values()]):
            for result in results:
                if not isinstance(result, Deferred):
                    decided = True
                    del batch[result.job_id]
                    self._decided(result.job_id, result.outcome)
                elif isinstance(result.error, StoreUnavailable):
                    waiting.append(result.error)
                else:
                    _count_failure(batch[result.job_id], result.error)
            if waiting and not decided and (last or len(waiting) > 1):
                raise waiting[0]


def _count_failure(one: _Undecided, error: BaseException) -> None:
    """From the last try on, the delivery is to be rejected unread. Raises `error` if even that fails."""
    one.failures += 1
    if one.failures > _MOST_FAILURES:
        raise error
    if one.failures == _MOST_FAILURES:
        one.delivery = one.delivery._replace(error=PoisonEvent(one.failures, error))


def _batches(deliveries: Iterable[Delivery]) -> Iterator[dict[str, _Undecided]]:
    """By job id, in order, each with at most _BATCH_CHARACTERS of text unless a single event has more."""
    batch: dict[str, _Undecided] = {}
    size = 0
    for delivery in deliveries:
        if batch and size + len(delivery.text) > _BATCH_CHARACTERS:
            yield batch
            batch, size = {}, 0
        batch[delivery.job_id] = _Undecided(delivery)
        size += len(delivery.text)
    if batch:
        yield batch

"""Process imported events in batches, as a worker does, and retry deliveries that cannot be decided now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

from consumers.db.engine import drop_connections
from consumers.errors import PoisonEvent, StoreUnavailable
from consumers.worker.batch import Deferred, process_batch
from consumers.worker.deliveries import Delivery
from producers.acknowledgements import Outcome
from producers.times import backoff_seconds

_BATCH_CHARACTERS = 4 * 1024 * 1024
_MOST_FAILURES = 3  # the same limit as a worker's
_FIRST_BACKOFF_SECONDS = 0.2
_LAST_BACKOFF_SECONDS = 5.0

_Answer = TypeVar("_Answer")


def retry_until_available(work: Callable[[], _Answer], say: Callable[[str], None], stopped: Event) -> _Answer:
    """Return the result of `work`. While the database is unavailable, call it again after growing pauses.

    Raises:
        StoreUnavailable: the database is unavailable, and `stopped` is set.
    """
    failures = 0
    while True:
        try:
            answer = work()
        except StoreUnavailable as error:
            failures += 1
            if failures == 1:
                say(f"waiting for the database: {error.with_advice()}")
            drop_connections()
            if stopped.wait(backoff_seconds(failures, first=_FIRST_BACKOFF_SECONDS, last=_LAST_BACKOFF_SECONDS)):
                raise
        else:
            if failures:
                say("the database is available again, the import continues")
            return answer


@dataclass
class _Undecided:
    """A delivery to decide. `failures` counts the defects that it met."""

    delivery: Delivery
    failures: int = 0


class ImportBatches:
    """Decides deliveries. Calls `decided` with the job id and outcome of each one after its commit.

    A single delivery that cannot be decided now is deferred. After 3 defects it is rejected as poison. If more
    than `most_deferred` deliveries are deferred, `insert` decides them before it continues.
    """

    def __init__(
        self,
        *,
        decided: Callable[[str, Outcome], None],
        say: Callable[[str], None],
        stopped: Event,
        most_deferred: int = 1000,
    ) -> None:
        self._decided = decided
        self._say = say
        self._stopped = stopped
        self._most_deferred = most_deferred
        self._deferred: dict[str, _Undecided] = {}

    def insert(self, deliveries: Iterable[Delivery]) -> None:
        """Decide the deliveries, except a few that are deferred. During an outage of the database, wait."""
        for batch in _batches(deliveries):
            retry_until_available(lambda batch=batch: self._process(batch), self._say, self._stopped)  # type: ignore[misc]  # mypy does not infer the lambda
            self._deferred |= batch
        if len(self._deferred) > self._most_deferred:
            self.finish()

    def finish(self) -> None:
        """Decide the deferred deliveries, however long that takes."""
        while self._deferred:
            retry_until_available(lambda: self._process(self._deferred, last=True), self._say, self._stopped)

    def _process(self, batch: dict[str, _Undecided], *, last: bool = False) -> None:
        """Process `batch` and remove the decided deliveries from it.

        Raises:
            StoreUnavailable: the database cannot decide any delivery of the batch now. A single delivery is deferred
                instead, so that it does not delay others, except in the `last` batch.
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
    """Count a failure. At the third, reject the delivery unread. Raise `error` if even that failed."""
    one.failures += 1
    if one.failures > _MOST_FAILURES:
        raise error
    if one.failures == _MOST_FAILURES:
        one.delivery = one.delivery._replace(error=PoisonEvent(one.failures, error))


def _batches(deliveries: Iterable[Delivery]) -> Iterator[dict[str, _Undecided]]:
    """Yield batches by job id, in order, of at most _BATCH_CHARACTERS of text, unless a single event has more."""
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

"""Batch processing: decode deliveries, insert their events and record their outcomes in one transaction.

If a batch fails as a whole, it is halved until the delivery that fails is alone: a bad event costs only itself, and
the others are still inserted in batches.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from sqlalchemy import Connection

from consumers.db.engine import get_db
from consumers.db.inserts import find_row, insert_events
from consumers.db.outcomes import OutcomeRow, discarded, forget_outcomes, record_outcomes
from consumers.errors import EventConflict, EventWithdrawn, PoisonEvent, StoreUnavailable, UnsupportedJob, described
from consumers.ops.metrics import COUNTS, UNKNOWN_TYPE
from consumers.worker.deliveries import Delivery
from producers.acknowledgements import Outcome
from producers.errors import HistoryError, InvalidEvent, SettingsError
from producers.events import IMPORT_PREFIX, KINDS, MAX_EVENT_BYTES, Event, Source, decode, has_bounded_structure
from producers.fields import EventId
from producers.fields import Sequence as SequenceNumber
from producers.trace_context import TraceContext, trace_of

# A child of RQ's logger, so that a stock worker, which sets up RQ's logger, shows these lines too.
logger = logging.getLogger("rq.worker.history")

ISOLATED_SECONDS = 2.0  # limit of a statement while the delivery that blocks a batch is isolated

_REJECTION_LABELS: dict[type[HistoryError], str] = {
    EventConflict: "conflict",
    EventWithdrawn: "withdrawn",
    PoisonEvent: "poison",
    UnsupportedJob: "unsupported",
}
_HEAD_CHARACTERS = 2000  # the id, source and sequence of our events are within the first 400

_SOURCE: TypeAdapter[str] = TypeAdapter(Source)
_SEQUENCE: TypeAdapter[int] = TypeAdapter(SequenceNumber)
_EVENT_ID: TypeAdapter[UUID] = TypeAdapter(EventId)


class Result(NamedTuple):
    """A decided delivery, committed to the database. `error` is set if, and only if, it was rejected.

    `discarded` is true if an operator had discarded the rejection before: the job needs nobody's attention then.
    """

    job_id: str
    outcome: Outcome
    source: str | None
    sequence: int | None
    event_id: UUID | None
    trace: TraceContext | None
    event_type: str
    error: HistoryError | None = None
    discarded: bool = False

    @property
    def failed(self) -> bool:
        """Whether the job belongs in RQ's failed registry."""
        return self.error is not None and not self.discarded and not self.recorded_by_withdrawal

    @property
    def recorded_by_withdrawal(self) -> bool:
        """Whether this delivery had made a row that was withdrawn: the withdrawal is the record of its outcome."""
        return isinstance(self.error, EventWithdrawn) and self.error.own

    @property
    def label(self) -> str:
        """stored, duplicate, conflict, withdrawn, invalid, poison, unsupported or discarded."""
        if self.discarded:
            return "discarded"
        return self.outcome.kind if self.error is None else _REJECTION_LABELS.get(type(self.error), "invalid")


class Deferred(NamedTuple):
    """A delivery to be retried: it could not be decided even alone. `error` is the reason.

    If that is a StoreUnavailable, the database did not execute the statement now; else this program has a defect.
    """

    job_id: str
    error: BaseException
    source: str | None
    sequence: int | None
    event_id: UUID | None
    trace: TraceContext | None
    event_type: str


class EventLogger(logging.LoggerAdapter[logging.Logger]):
    """Logger of lines about one delivery. Each line has the delivery's fields and ends with its trace context."""

    def __init__(self, logger: logging.Logger, delivery: Result | Deferred) -> None:
        fields = {
            "event_id": delivery.event_id,
            "job_id": delivery.job_id,
            "source": delivery.source,
            "sequence": delivery.sequence,
            "outcome": delivery.label if isinstance(delivery, Result) else None,
            **(delivery.trace.attributes() if delivery.trace else {}),
        }
        super().__init__(logger, fields)
        self._end = f" ({delivery.trace})".replace("%", "%%") if delivery.trace else ""

    def process(self, msg: str, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        """Add the end of the text and the fields. `msg` needs at least one argument: without any, logging
        leaves %% as it is."""
        return msg + self._end, {**kwargs, "extra": self.extra}


def process_batch(
    deliveries: Sequence[Delivery], *, statement_seconds: float | None = None
) -> Iterator[Sequence[Result | Deferred]]:
    """Decide each delivery. Yields, after each commit, the deliveries that it decided, in any order.

    `statement_seconds` limits each statement, in addition to the limit of the process.

    Raises:
        StoreUnavailable: the database cannot store anything now. Deliveries that were not yielded are undecided.
        SettingsError: the settings name no database.
    """
    if not deliveries:
        return
    try:
        results = _process_together(deliveries, statement_seconds)
    except StoreUnavailable as error:
        if not error.one_statement:
            raise
        problem: BaseException = error
        statement_seconds = ISOLATED_SECONDS
    except (SettingsError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also SystemExit and others, which a library may raise for one event
        problem = error
    else:
        yield results
        return
    if len(deliveries) > 1:
        half = len(deliveries) // 2
        yield from process_batch(deliveries[:half], statement_seconds=statement_seconds)
        yield from process_batch(deliveries[half:], statement_seconds=statement_seconds)
    elif isinstance(problem, InvalidEvent) and deliveries[0].error is None:
        yield from process_batch([deliveries[0]._replace(error=problem)], statement_seconds=statement_seconds)
    else:
        yield [deferred(deliveries[0], problem)]


def deferred(delivery: Delivery, error: BaseException) -> Deferred:
    """Return a delivery as deferred because of `error`."""
    return Deferred(delivery.job_id, error, *_reference_of(delivery.event_text), _event_type(delivery))


def _process_together(deliveries: Sequence[Delivery], statement_seconds: float | None) -> list[Result]:
    events = [_decoded(delivery) for delivery in deliveries]
    started = time.monotonic()
    with get_db(statement_seconds=statement_seconds) as db:
        answers = iter(insert_events(db, [event for event in events if not isinstance(event, HistoryError)]))
        results: list[Result] = []
        outcomes: list[OutcomeRow] = []
        for delivery, event in zip(deliveries, events, strict=True):
            answer = event if isinstance(event, HistoryError) else next(answers)
            if isinstance(answer, PoisonEvent) and (decided := _decided_before(db, delivery)):
                results.append(decided)
            elif isinstance(answer, HistoryError):
                result = _rejected(delivery, answer)
                results.append(result)
                if not result.recorded_by_withdrawal:
                    outcomes.append(_outcome_of(result, delivery.event_text))
            else:
                assert not isinstance(event, HistoryError)
                outcome = Outcome("stored" if answer.created else "duplicate", answer.row_id)
                result = Result(
                    delivery.job_id, outcome, event.source, event.sequence, event.id, event.trace, event.type
                )
                results.append(result)
                # If this delivery made the row itself, in an earlier attempt, then that is not recorded as a duplicate.
                if (answer.source, answer.sequence) != (event.source, event.sequence):
                    outcomes.append(_outcome_of(result))
        noted = {outcome.job_id for outcome in outcomes}
        record_outcomes(db, outcomes)
        if rejected := [result.job_id for result in results if result.error is not None]:
            known = discarded(db, rejected)
            results = [result._replace(discarded=result.job_id in known) for result in results]
        forget_outcomes(db, [result.job_id for result in results if result.job_id not in noted])
    for report in (partial(_count, events, results, time.monotonic() - started), partial(_log, events, results)):
        report_safely(report)
    return results


def report_safely(report: Callable[[], None]) -> None:
    """Call `report`, which logs or counts, and ignore any exception: the result is already committed."""
    try:
        report()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        with suppress(Exception):
            logger.error("cannot write a log line or update a counter: %s", described(error))


def _decoded(delivery: Delivery) -> Event | HistoryError:
    if delivery.error is not None or delivery.model is None:
        return delivery.error or InvalidEvent("event: has no known type")
    if delivery.event is not None:
        return delivery.event
    try:
        return decode(delivery.text, delivery.model)
    except InvalidEvent as error:
        return error


def _rejected(delivery: Delivery, error: HistoryError) -> Result:
    outcome = Outcome("rejected", reason=_storable(str(error)))
    return Result(delivery.job_id, outcome, *_reference_of(delivery.event_text), _event_type(delivery), error)


def _outcome_of(result: Result, text: Any = None) -> OutcomeRow:
    identity = (result.source, result.sequence, result.event_id)
    if result.error is None:
        return OutcomeRow(result.job_id, "duplicate", *identity)
    return OutcomeRow(result.job_id, "rejected", *identity, result.outcome.reason, _storable(text))


def _decided_before(db: Connection, delivery: Delivery) -> Result | None:
    """Return the result of an earlier attempt whose row was committed before its worker crashed; else None.

    If the row was withdrawn since then, the delivery is rejected for that reason.
    """
    reference = _reference_of(delivery.event_text)
    if reference.source is None or reference.sequence is None or reference.event_id is None:
        return None
    found = find_row(db, reference.source, reference.sequence, reference.event_id)
    if found is None:
        return None
    if isinstance(found, EventWithdrawn):
        return _rejected(delivery, found)
    return Result(delivery.job_id, Outcome("stored", found), *reference, _event_type(delivery))


def _event_type(delivery: Delivery) -> str:
    return next((kind.type for kind in KINDS.values() if kind.model is delivery.model), UNKNOWN_TYPE)


def _count(events: Sequence[Event | HistoryError], results: Sequence[Result], seconds: float) -> None:
    now = time.time()
    labels = [result.label for result in results]
    # Events of an import are years old: they are left out.
    lags = [
        max(now - event.time.timestamp(), 0.0)  # not negative: the clocks of hosts differ
        for event, label in zip(events, labels, strict=True)
        if label == "stored" and not isinstance(event, HistoryError) and not event.source.startswith(IMPORT_PREFIX)
    ]
    COUNTS.batch(Counter(zip([result.event_type for result in results], labels, strict=True)), seconds, lags)


def _log(events: Sequence[Event | HistoryError], results: Sequence[Result]) -> None:
    """Log each rejection, and the totals of a batch. Log an accepted event that came alone; others only at DEBUG."""
    for result in (one for one in results if one.error is not None):
        if result.failed:
            EventLogger(logger, result).error("rejected job %s: %s", result.job_id, result.outcome.reason)
        elif result.discarded:
            EventLogger(logger, result).info("job %s was discarded before and stays rejected", result.job_id)
        else:
            EventLogger(logger, result).info("job %s is rejected again: %s", result.job_id, result.outcome.reason)
    if len(results) > 1:
        stored, duplicates = (sum(one.outcome.kind == kind for one in results) for kind in ("stored", "duplicate"))
        rejected = len(results) - stored - duplicates
        logger.info("stored %d events, %d duplicates, %d rejected", stored, duplicates, rejected)
    each = logging.INFO if len(results) == 1 else logging.DEBUG
    if logger.isEnabledFor(each):
        for event, result in zip(events, results, strict=True):
            if result.error is None and not isinstance(event, HistoryError):
                what = (result.outcome.kind, event.id, event.data.summary, result.outcome.row_id)
                EventLogger(logger, result).log(each, "%s event %s: %s as row %d", *what)


def acknowledgements(results: Iterable[Result]) -> dict[str, list[str]]:
    """Return for each source its acknowledgements without their time: job id, text, job id, text …

    An event without a sequence gets none: its producer has no outbox.
    """
    by_source: defaultdict[str, list[str]] = defaultdict(list)
    for one in results:
        if one.source is not None and one.sequence is not None:
            by_source[one.source] += [one.job_id, f"{one.event_id or '-'} {one.outcome}"]
    return by_source


class EventReference(NamedTuple):
    """Attributes of an event whose text need not be valid; None for each that is unreadable."""

    source: str | None = None
    sequence: int | None = None
    event_id: UUID | None = None
    trace: TraceContext | None = None


def _reference_of(text: Any) -> EventReference:
    try:
        attributes = _document(text)
        source, sequence, event_id = (attributes.get(name) for name in ("source", "sequence", "id"))
        checked = _checked(_SOURCE, source), _checked(_SEQUENCE, sequence), _checked(_EVENT_ID, event_id)
        return EventReference(*checked, trace_of(attributes))
    except KeyboardInterrupt:
        raise
    except BaseException:  # not a text, not an object, or anything that a JSON parser can raise
        return EventReference()


def _document(text: str) -> Any:
    """Return a text parsed as JSON. Of a text that could exhaust memory, parse only the beginning."""
    if has_bounded_structure(text[:MAX_EVENT_BYTES]):
        return json.loads(text[:MAX_EVENT_BYTES])
    # Our events begin with their id, source and sequence.
    return from_json(text[:_HEAD_CHARACTERS], allow_partial=True)


def _checked(adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.validate_json(json.dumps(value))
    except ValidationError:
        return None


def _storable(text: Any) -> str:
    """Return a rejected text as PostgreSQL can store it; characters that it cannot store become escapes."""
    try:
        shown = text if isinstance(text, str) else repr(text)
    except (RecursionError, ValueError):  # nested too deeply, or a number with too many digits
        shown = f"a {type(text).__name__}"
    return shown[:MAX_EVENT_BYTES].encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")

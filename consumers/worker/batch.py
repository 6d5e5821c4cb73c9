"""What becomes of deliveries: decided for a batch in one transaction, and told to the producer.

A batch that cannot be settled as a whole is halved until what is in the way stands alone: a bad event costs only
itself, and the rest goes on in batches.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from redis.client import Pipeline
from sqlalchemy import Connection

from consumers.db.engine import get_db
from consumers.db.inserts import find_row, insert_events
from consumers.db.outcomes import NoRow, forget_outcomes, record_outcomes
from consumers.errors import EventConflict, PoisonEvent, RefusedJob, StoreUnavailable, described
from consumers.ops.metrics import COUNTS, UNKNOWN_TYPE
from producers.acknowledgements import ACKNOWLEDGEMENT_TTL_SECONDS, Outcome
from producers.errors import HistoryError, InvalidEvent, SettingsError
from producers.events import KINDS, MAX_EVENT_BYTES, Event, Source, decode, is_readable
from producers.fields import EventId
from producers.fields import Sequence as SequenceNumber
from producers.redis_keys import acknowledgement_key

# Below RQ's own, whose level and handlers a stock worker sets up: these lines are seen there too.
logger = logging.getLogger("rq.worker.history")

ISOLATED_SECONDS = 2.0  # for a statement while looking for the one that waits for something

_REFUSALS: dict[type[HistoryError], str] = {EventConflict: "conflict", PoisonEvent: "poison", RefusedJob: "refused"}
_HEAD_CHARACTERS = 2000  # id, source and sequence are in an event's first 400
_IMPORTED = "import/"  # begins the sources of old history, which is late by years

# KEYS acknowledgements of one source; ARGV seconds until they expire, then for each delivery its job id and what
# follows the time. The time is Redis': relays compare it with that, and no host's clock has a say.
_ACKNOWLEDGE = """
local fields, now = {}, redis.call('TIME')[1]
for n = 2, #ARGV, 2 do
    fields[n - 1] = ARGV[n]
    fields[n] = now .. ' ' .. ARGV[n + 1]
end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""

_SOURCE: TypeAdapter[str] = TypeAdapter(Source)
_SEQUENCE: TypeAdapter[int] = TypeAdapter(SequenceNumber)
_EVENT_ID: TypeAdapter[UUID] = TypeAdapter(EventId)


class Delivery(NamedTuple):
    """One job's event as text, and the model it must fit; `refusal` when it is to be refused unread."""

    job_id: str
    text: Any
    model: type[Event] | None
    refusal: HistoryError | None = None

    @property
    def event_type(self) -> str:
        return next((kind.type for kind in KINDS.values() if kind.event is self.model), UNKNOWN_TYPE)


class Settled(NamedTuple):
    """What became of one delivery, decided and committed. `error` is set exactly when it was rejected."""

    job_id: str
    outcome: Outcome
    source: str | None
    sequence: int | None
    event_id: UUID | None
    event_type: str
    error: HistoryError | None = None

    @property
    def word(self) -> str:
        """stored, duplicate, conflict, invalid, poison or refused."""
        return self.outcome.kind if self.error is None else _REFUSALS.get(type(self.error), "invalid")


class Unsettled(NamedTuple):
    """A delivery that alone could not be decided: the store had trouble with it, or this program has a defect."""

    job_id: str
    error: BaseException
    source: str | None
    sequence: int | None
    event_id: UUID | None
    event_type: str


def log_fields(end: Settled | Unsettled) -> dict[str, Any]:
    """What a log line about one delivery has beside its text, as `extra`."""
    outcome = end.word if isinstance(end, Settled) else None
    identity = {"event_id": end.event_id, "job_id": end.job_id, "source": end.source, "sequence": end.sequence}
    return identity | {"outcome": outcome}


def settle(
    deliveries: Sequence[Delivery], *, patience_seconds: float | None = None
) -> Iterator[Sequence[Settled | Unsettled]]:
    """Each delivery's end, in no particular order; together those that one transaction has committed, once it has.

    `patience_seconds` limits each statement, beyond the limit that the process has.

    Raises:
        StoreUnavailable: the database cannot take anything now. What was not answered before is undecided.
        SettingsError: the settings name no database.
    """
    try:
        settled = _settle_together(deliveries, patience_seconds)
    except StoreUnavailable as error:
        if not error.one_statement:
            raise
        problem: BaseException = error
        patience_seconds = ISOLATED_SECONDS
    except (SettingsError, KeyboardInterrupt):
        raise
    except BaseException as error:  # of a library, GeneratorExit, SystemExit: an event's, like any other exception
        problem = error
    else:
        yield settled
        return
    if len(deliveries) > 1:
        half = len(deliveries) // 2
        yield from settle(deliveries[:half], patience_seconds=patience_seconds)
        yield from settle(deliveries[half:], patience_seconds=patience_seconds)
    elif isinstance(problem, InvalidEvent) and deliveries[0].refusal is None:
        yield from settle([deliveries[0]._replace(refusal=problem)], patience_seconds=patience_seconds)
    else:
        yield [unsettled(deliveries[0], problem)]


def _settle_together(deliveries: Sequence[Delivery], patience_seconds: float | None) -> list[Settled]:
    read = [_read(delivery) for delivery in deliveries]
    started = time.monotonic()
    with get_db(statement_seconds=patience_seconds) as db:
        answers = iter(insert_events(db, [event for event in read if not isinstance(event, HistoryError)]))
        settled, without_row = [], []
        for delivery, event in zip(deliveries, read, strict=True):
            answer = event if isinstance(event, HistoryError) else next(answers)
            if isinstance(answer, PoisonEvent) and (end := _stored_before(db, delivery)):
                settled.append(end)
                continue
            if isinstance(answer, HistoryError):
                end, no_row = _rejected(delivery, answer)
                without_row.append(no_row)
            else:
                assert not isinstance(event, HistoryError)
                outcome = Outcome("stored" if answer.created else "duplicate", answer.row_id)
                end = Settled(delivery.job_id, outcome, event.source, event.sequence, event.id, event.type)
                # The delivery that made the row may come again; its own row accounts for it.
                if (answer.source, answer.sequence) != (event.source, event.sequence):
                    without_row.append(NoRow(delivery.job_id, "duplicate", event.source, event.sequence, event.id))
            settled.append(end)
        noted = {no_row.job_id for no_row in without_row}
        record_outcomes(db, without_row)
        forget_outcomes(db, [end.job_id for end in settled if end.job_id not in noted])
    for report in (partial(_count, read, settled, time.monotonic() - started), partial(_log, read, settled)):
        without_defects(report)
    return settled


def without_defects(report: Callable[[], None]) -> None:
    """Log or count, and ignore any exception: the result is already committed."""
    try:
        report()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        with suppress(Exception):
            logger.error("a log line or a count is missing: %s", described(error))


def _read(delivery: Delivery) -> Event | HistoryError:
    if delivery.refusal is not None or delivery.model is None:
        return delivery.refusal or InvalidEvent("event: has no known type")
    try:
        return decode(delivery.text, delivery.model)
    except InvalidEvent as error:
        return error


def _rejected(delivery: Delivery, error: HistoryError) -> tuple[Settled, NoRow]:
    claim, reason = _Claim.of(delivery.text), _storable(str(error))
    end = NoRow(
        delivery.job_id,
        "rejected",
        claim.source,
        claim.sequence,
        claim.event_id,
        reason,
        _storable(delivery.text),
    )
    outcome = Outcome("rejected", reason=reason)
    identity = (claim.source, claim.sequence, claim.event_id, delivery.event_type)
    return Settled(delivery.job_id, outcome, *identity, error), end


def _stored_before(db: Connection, delivery: Delivery) -> Settled | None:
    """The end of a delivery that has made its row, in a transaction whose worker died before it could tell."""
    claim = _Claim.of(delivery.text)
    if claim.source is None or claim.sequence is None or claim.event_id is None:
        return None
    row_id = find_row(db, claim.source, claim.sequence, claim.event_id)
    if row_id is None:
        return None
    identity = (claim.source, claim.sequence, claim.event_id, delivery.event_type)
    return Settled(delivery.job_id, Outcome("stored", row_id), *identity)


def unsettled(delivery: Delivery, error: BaseException) -> Unsettled:
    """The end of a delivery that `error` kept from being decided."""
    claim = _Claim.of(delivery.text)
    return Unsettled(delivery.job_id, error, claim.source, claim.sequence, claim.event_id, delivery.event_type)


def _count(read: Sequence[Event | HistoryError], settled: Sequence[Settled], seconds: float) -> None:
    now = time.time()
    words = [end.word for end in settled]
    lags = [
        max(now - event.time.timestamp(), 0.0)  # clocks differ
        for event, word in zip(read, words, strict=True)
        if word == "stored" and not isinstance(event, HistoryError) and not event.source.startswith(_IMPORTED)
    ]
    COUNTS.batch(Counter(zip([end.event_type for end in settled], words, strict=True)), seconds, lags)


def _log(read: Sequence[Event | HistoryError], settled: Sequence[Settled]) -> None:
    """A line for each rejection; for the others one for each event alone or for the batch."""
    for end in settled:
        if end.error is not None:
            logger.error("rejected job %s: %s", end.job_id, end.outcome.reason, extra=log_fields(end))
    if len(settled) > 1:
        rows, had = (sum(end.outcome.kind == kind for end in settled) for kind in ("stored", "duplicate"))
        logger.info("stored %d events, had %d, rejected %d", rows, had, len(settled) - rows - had)
    each = logging.INFO if len(settled) == 1 else logging.DEBUG
    if logger.isEnabledFor(each):
        for event, end in zip(read, settled, strict=True):
            if end.error is None and not isinstance(event, HistoryError):
                word = "stored" if end.outcome.kind == "stored" else "had"
                what = (word, event.id, event.data.summary, end.outcome.row_id)
                logger.log(each, "%s event %s: %s as row %d", *what, extra=log_fields(end))


def acknowledge(pipe: Pipeline, ends: Iterable[Settled]) -> None:
    """Tell the producers, which take it from there; nothing to tell to one that keeps no outbox."""
    by_source: defaultdict[str, list[str]] = defaultdict(list)
    for one in ends:
        if one.source is not None and one.sequence is not None:
            by_source[one.source] += [one.job_id, f"{one.event_id or '-'} {one.outcome}"]
    for source, words in by_source.items():
        pipe.eval(_ACKNOWLEDGE, 1, acknowledgement_key(source), ACKNOWLEDGEMENT_TTL_SECONDS, *words)


@dataclass(frozen=True)
class _Claim:
    """What a refused text says of itself, as far as it can be read."""

    source: str | None = None
    sequence: int | None = None
    event_id: UUID | None = None

    @classmethod
    def of(cls, text: Any) -> _Claim:
        try:
            document = _document(text) if isinstance(text, str) else None
            attributes = document if isinstance(document, dict) else {}
            source, sequence, event_id = (attributes.get(name) for name in ("source", "sequence", "id"))
            return cls(_checked(_SOURCE, source), _checked(_SEQUENCE, sequence), _checked(_EVENT_ID, event_id))
        except KeyboardInterrupt:
            raise
        except BaseException:  # whatever a reader of JSON can raise: a text that cannot be read claims nothing
            return cls()


def _document(text: str) -> Any:
    if is_readable(text[:MAX_EVENT_BYTES]):
        return json.loads(text[:MAX_EVENT_BYTES])
    # Ours begin with the attributes, and what is refused for its size need not be read to its end.
    return from_json(text[:_HEAD_CHARACTERS], allow_partial=True)


def _checked(adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.validate_json(json.dumps(value))
    except ValidationError:
        return None


def _storable(text: Any) -> str:
    """The refused text as PostgreSQL can keep it: what it cannot hold is shown as an escape."""
    try:
        shown = text if isinstance(text, str) else repr(text)
    except (RecursionError, ValueError):  # nested too deeply, or a number with too many digits
        shown = f"a {type(text).__name__}"
    return shown[:MAX_EVENT_BYTES].encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")

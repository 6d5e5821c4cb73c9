"""Health of this machine's outbox: its entries and their age, its file, and copies of it."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from redis import AuthenticationError, Redis, RedisError
from rq import Queue
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from consumers.ops.checks import HealthCheck, State, check_result, counted, duration, problems_of, size
from consumers.ops.redis_errors import CHECK_REDIS, is_unreachable, redis_problem
from producers.acknowledgements import shown
from producers.entries import EntryHead
from producers.errors import OutboxError
from producers.outbox import MAX_BYTES, Outbox
from producers.outbox_place import check_is_no_folder
from producers.outbox_salvage import ranges_text
from producers.redis_keys import token_key
from producers.rq_queue import without_acknowledgement
from producers.settings import TransportSettings

OUTBOX_LATE_SECONDS = 600.0
INCLUDED = " (discarded ones included)"  # an outbox does not learn that an operator has discarded a rejection
_VERY_LATE_SECONDS = 86400.0
_HIGH_SHARE = 0.5  # from here on settled entries are removed: a fuller outbox is full of unsettled ones
_FULL_SHARE = 0.9
_CHECK_SECONDS = 3.0
_PAGE_ENTRIES = 1000
_YOUNG_SECONDS = 30.0  # Redis is not asked about younger entries
_REDIS_SECONDS = 1.0  # for all questions together


@dataclass(frozen=True)
class OutboxHealth:
    """Number of entries by state, and the age of the oldest one that no worker has acknowledged."""

    pending: int
    sent: int
    rejected: int
    oldest_unacknowledged_seconds: float | None
    used_bytes: int
    is_relayed: bool | None = None  # None: not checked
    max_bytes: ClassVar[int] = MAX_BYTES  # limit of used_bytes
    damaged_files: int = 0  # quarantined files, salvaged ones included, until they are deleted

    @property
    def state(self) -> State:
        """`warn` or `fail` if the oldest entry is late, see OUTBOX_LATE_SECONDS."""
        age = self.oldest_unacknowledged_seconds or 0.0
        if age <= OUTBOX_LATE_SECONDS:
            return "ok"
        return "fail" if age > _VERY_LATE_SECONDS or self.is_relayed is False else "warn"

    def checks(self) -> Iterator[HealthCheck]:
        age = self.oldest_unacknowledged_seconds
        found = f"{self.pending} pending, {self.sent} sent"
        found += "" if age is None else f", the oldest {duration(age)} old"
        advice = "check the lines about Redis, workers and PostgreSQL"
        if self.is_relayed is False:
            found += "; no process sends them"
            advice = "start the controller or trading-history relay, or run trading-history outbox flush"
        yield HealthCheck("outbox", self.state, found, "" if self.state == "ok" else advice)
        problem = f"{self.rejected}{INCLUDED}" if self.rejected else ""
        advice = "run trading-history failed list on a machine that reaches the database"
        yield check_result("outbox rejections", "none", problem, advice=advice, state="warn")
        share = self.used_bytes / self.max_bytes
        used = f"{size(self.used_bytes)}, {share:.0%} of its limit"
        advice = "make sure that Redis and workers run: a full outbox accepts no event"
        state: State = "fail" if share > _FULL_SHARE else "warn"
        yield check_result("outbox size", used, used if share > _HIGH_SHARE else "", advice=advice, state=state)

    def problems(self) -> Iterator[str]:
        """Yield the problems of the outbox: its events are late, or it is nearly full."""
        yield from problems_of(self.checks(), strict="outbox")


def outbox_of_settings(*, ask_relay: bool = False) -> OutboxHealth | None:
    """Read the outbox of the settings. Returns None if this machine has none.

    With `ask_relay`, and if an entry is late, also find out whether a process relays the outbox.

    Raises:
        OutboxError: the outbox cannot be read.
        SettingsError: a setting is invalid.
    """
    settings = TransportSettings.from_environment()
    if not has_outbox(settings.outbox):
        return None
    with Outbox(settings.outbox) as outbox, _redis_of(settings) as redis:
        status = outbox.status()
        age = oldest_unacknowledged_seconds(outbox, redis)
        is_relayed = _is_relayed(outbox) if ask_relay and age is not None and age > OUTBOX_LATE_SECONDS else None
        damaged = [*outbox.quarantine.damaged_files(), *outbox.quarantine.salvaged_files()]
        used_bytes = outbox.used_bytes()
        return OutboxHealth(
            status.pending, status.sent, status.rejected, age, used_bytes, is_relayed, damaged_files=len(damaged)
        )


def oldest_unacknowledged_seconds(outbox: Outbox, redis: Redis | None) -> float | None:
    """Return the age in seconds of the oldest entry that is neither settled nor acknowledged, or None.

    Acknowledgements are read from Redis too, because a controller that has ended does not read them. Without Redis, or
    if it does not answer within 1 s, this is the age of the oldest unsettled entry.

    Raises:
        OutboxError: the outbox cannot be read.
    """
    unsettled = outbox.status().oldest_unsettled_seconds
    if redis is None or unsettled is None or unsettled < _YOUNG_SECONDS:
        return unsettled
    try:
        sent = _oldest_sent_seconds(outbox, redis, time.monotonic() + _REDIS_SECONDS)
    except (RedisError, TimeoutError):
        return unsettled
    return max((age for age in (sent, outbox.oldest_pending_seconds()) if age is not None), default=None)


def _oldest_sent_seconds(outbox: Outbox, redis: Redis, deadline: float) -> float | None:
    after = 0
    while True:
        page = outbox.deliveries.sent(after, _PAGE_ENTRIES)
        ages = {head.position: age for head, age in page}
        waiting = _without_acknowledgement_before(redis, [head for head, _ in page], deadline)
        if waiting:
            return ages[waiting[0].position]
        if len(page) < _PAGE_ENTRIES:
            return None
        after = page[-1][0].position


def _without_acknowledgement_before(redis: Redis, heads: Sequence[EntryHead], deadline: float) -> list[EntryHead]:
    """Return the entries without an acknowledgement. Raises TimeoutError at the deadline."""
    answer: Future[list[EntryHead]] = Future()

    def ask() -> None:
        try:
            answer.set_result(without_acknowledgement(redis, heads))
        except Exception as error:  # raised in the caller, if it still waits
            answer.set_exception(error)

    threading.Thread(target=ask, name="history-acknowledgements", daemon=True).start()
    return answer.result(max(deadline - time.monotonic(), 0.0))


def has_outbox(path: Path) -> bool:
    """Return whether the outbox file exists. Raises OutboxError if that cannot be found out, or if it is a folder."""
    check_is_no_folder(path)
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise OutboxError(f"outbox {path}: {error.strerror or error}") from error


def _redis_of(settings: TransportSettings) -> AbstractContextManager[Redis | None]:
    return nullcontext() if settings.redis_url is None else settings.redis()


def _is_relayed(outbox: Outbox) -> bool:
    """Return whether some process relays the outbox, by trying the relay's lock and releasing it at once."""
    lock = outbox.relay_lock()
    try:
        return not lock.acquire()
    finally:
        lock.release()


def unsettled_reason(damaged: Sequence[Path], relay_failure: str | None, *, if_away: str, otherwise: str) -> str:
    """Return why entries are pending or sent, as far as this machine can find out, and what to do.

    `damaged` are files that are not salvaged yet, `relay_failure` is why this process cannot send now. `if_away` is the
    advice if Redis cannot be reached, `otherwise` the one if a worker is there.

    Raises:
        SettingsError: REDIS_URL is not set or not valid.
    """
    if damaged:
        files = ", ".join(map(str, damaged))
        return f"Not salvaged yet: {files}. Start the controller or trading-history relay: either salvages them."
    settings = TransportSettings.from_environment()
    try:
        with settings.redis() as redis:
            jobs = Queue(settings.queue, connection=redis).count
            keys: Any = redis.smembers(WORKERS_BY_QUEUE_KEY % settings.queue)
            states = {redis.hget(key, "state") for key in keys}
    except RedisError as error:
        if not is_unreachable(error) or isinstance(error, AuthenticationError):
            return f"Redis cannot be used: {redis_problem(error)}."
        return f"Redis cannot be reached ({type(error).__name__}): {CHECK_REDIS}. {if_away}"
    if relay_failure is not None:
        return f"Events cannot be sent: {relay_failure}"
    waits = f"Queue {settings.queue} has {counted(jobs, 'waiting job')}"
    if states == {b"waiting for the database"}:
        return f"{waits}, and its workers wait for the database: run trading-history doctor on a worker's host."
    workers = f"{counted(len(keys), 'worker')}. {otherwise}" if keys else "no worker. Start one: trading-history worker"
    return f"{waits} and {workers}"


def outbox_file_checks(path: Path) -> Iterator[HealthCheck]:
    """Yield the check of the outbox file, and of damaged files that were quarantined. Raises OutboxError."""
    name = "outbox file"
    with Outbox(path) as outbox:
        fault = outbox.quick_check(_CHECK_SECONDS)
        waiting, done = outbox.quarantine.damaged_files(), outbox.quarantine.salvaged_files()
        losses = outbox.quarantine.losses()
    if fault not in (None, "unfinished"):
        advice = (
            "check the disk, then restart the controller or relay: it quarantines the file and salvages its entries"
        )
        yield HealthCheck(name, "fail", f"damaged: {fault}", advice)
    elif waiting:
        found = f"damaged files that are not salvaged yet: {', '.join(map(str, waiting))}"
        yield HealthCheck(
            name, "fail", found, "start the controller or trading-history relay: either salvages their entries"
        )
    elif done:
        lost = "; ".join(f"{source}: {ranges_text(ranges)}" for source, ranges in losses.items())
        lost = lost or "no gaps after the first readable entry"
        found = f"salvaged after damage: {', '.join(map(str, done))}. Numbers that could not be read: {lost}"
        yield HealthCheck(
            name, "warn", found, "run trading-history audit, check the disk, then delete the salvaged file"
        )
    else:
        yield HealthCheck(name, "ok", "sound" if fault is None else f"no fault found in {_CHECK_SECONDS:.0f} s")


def outbox_copy_checks(settings: TransportSettings) -> Iterator[HealthCheck]:
    """Yield the check for other copies of this outbox, by what its relays have noticed and by the token in Redis.

    Raises:
        OutboxError: the outbox cannot be read.
        RedisError: Redis cannot be read now.
    """
    with Outbox(settings.outbox) as outbox:
        sources = outbox.sources()
        current = [source.full_name for source in sources if source.current]
        left = [source.full_name for source in sources if source.left_because == "copied"]
        with _redis_of(settings) as redis:
            tokens = redis.mget([token_key(source) for source in current]) if redis is not None and current else []
        header = outbox.header.read()  # after Redis: a relay announces a token before it puts it into Redis
    problem = f"this outbox was copied or restored: another copy now uses its source {', '.join(left)}" if left else ""
    if any(token is not None and shown(token) not in header.tokens for token in tokens):
        problem = f"another copy of this outbox now uses its source {', '.join(current)}"
    found = "no other copy found" + (" (Redis was not asked: REDIS_URL is not set)" * (settings.redis_url is None))
    advice = "run trading-history audit on the host of each copy; give each controller a separate outbox"
    yield check_result("outbox copies", found, problem, advice=advice, state="warn")

"""The machine: the actions of a delivery. Hypothesis chooses them, and shrinks a run that breaks the model."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from consumers.db.engine import get_db
from consumers.db.withdrawals import withdraw
from consumers.errors import StoreUnavailable
from consumers.ops.failed import discard, requeue
from consumers.ops.rejections import rejections
from producers.errors import HistoryError, InvalidEvent
from producers.events import Payload
from tests.factories import a_snapshot, an_archive
from tests.property.delivery.base_machine import action, counted, faults, numbers, workers
from tests.property.delivery.bots import RELAYS
from tests.property.delivery.disasters import Disasters
from tests.property.delivery.faults import Process
from tests.property.delivery.servers import QUEUE
from tests.property.delivery.workers import run_stock_worker

# A fact has one event id; another content of it is a conflict.
payloads = st.tuples(st.sampled_from(["snapshot", "archive"]), st.integers(0, 2), st.integers(0, 1))

_RECORDINGS = [*["", "and send", "and store"] * 4, "invalid"]  # the last one less often
_some_payloads = st.lists(payloads, min_size=1, max_size=3)


def payload_of(kind: str, fact: int, content: int) -> Payload:
    """Return one of a few payloads."""
    after = timedelta(seconds=fact)
    if kind == "snapshot":
        return a_snapshot(after=after, trade_count=content)
    return an_archive(after=after, signals=[{"market_id": str(content)}])


def _has_unstored(machine: Any) -> bool:
    return any(one.state != "stored" for kept in machine.contents.entries.values() for one in kept)


def _has_waiting(machine: Any) -> bool:
    return bool(machine.contents.queued.waiting)


def _has_work(machine: Any) -> bool:
    return _has_waiting(machine) or any(worker.reserved for worker in machine.world.workers)


def _has_decided(machine: Any) -> bool:
    return bool(machine.contents.stored.rows or machine.contents.stored.outcomes)


class DeliveryMachine(Disasters):
    """Bots that record, relays, workers and operators."""

    @initialize(events=_some_payloads)
    @counted
    def begin(self, events: list[tuple[str, int, int]]) -> None:
        """Begin with a few events that are queued: most actions need some."""
        self._record(0, events, None)
        self.bot(0).sweep("first")

    @action(
        weight=4,
        bot=numbers,
        events=_some_payloads,
        what=st.sampled_from(_RECORDINGS),
        fault=faults(4),
    )
    def record(self, bot: int, events: list[tuple[str, int, int]], what: str, fault: Any) -> None:
        """Record events in one call, with the fault; then relay them ("and send") and store them ("and store").

        Or try to record something invalid.
        """
        if what == "invalid":
            self._record_invalid(bot)
            return
        self._record(bot, events, fault)
        if what:
            self.bot(bot).sweep("first")
        if what == "and store":
            self.worker(0).run(500)
            self.bot(bot).sweep("first")

    def _record(self, bot: int, events: list[tuple[str, int, int]], fault: Any) -> None:
        given = [payload_of(*event) for event in events]
        receipts = self.bot(bot).record(given, fault)
        if receipts is None:
            assert fault is not None, "no receipts of a producer that lives"
        else:
            self.model.check_recorded(receipts, given, self.contents)

    def _record_invalid(self, bot: int) -> None:
        """Try to record an event together with a value that is none: neither is recorded."""
        before = self.contents.job_ids_kept
        with pytest.raises(InvalidEvent):
            self.bot(bot).record([a_snapshot(), "not an event"])  # type: ignore[list-item]
        assert self.contents.job_ids_kept == before

    @action(when=_has_unstored, weight=5, bot=numbers, relay=st.sampled_from(RELAYS), fault=faults(9, commits=3))
    def sweep(self, bot: int, relay: str, fault: Any) -> None:
        self.bot(bot).sweep(relay, fault)

    @action(bot=numbers, what=st.sampled_from([*RELAYS, "bot", "kill"]), fault=faults(6))
    def end(self, bot: int, what: str, fault: Any) -> None:
        """Stop a relay, or all processes of a bot; or kill them."""
        if what == "kill":
            self.bot(bot).kill()
        elif what == "bot":
            self.bot(bot).close()
        else:
            self.bot(bot).end_relay(what, fault)

    @action(when=_has_work, weight=8, worker=workers, limit=st.integers(1, 4), fault=faults(8, commits=1))
    def step_worker(self, worker: int, limit: int, fault: Any) -> None:
        """Let a worker do its next step: reserve, process or complete."""
        one = self.worker(worker)
        if not one.reserved:
            one.reserve(limit, fault)
        elif one.results is None:
            one.process(fault)
        else:
            one.complete(fault)

    @action(worker=workers, what=st.sampled_from(["maintain", "stop", "renew"]), fault=faults(8), weight=2)
    def between_steps(self, worker: int, what: str, fault: Any) -> None:
        """Let a worker do what it does between or beside its steps: maintenance, ending itself, renewing its lease."""
        one = self.worker(worker)
        {"maintain": one.maintain, "stop": one.stop, "renew": one.renew}[what](fault)

    @action(when=_has_waiting, weight=2, worker=workers, max_jobs=st.integers(1, 6), fault=faults(30, "stop"))
    def run_worker(self, worker: int, max_jobs: int, fault: Any) -> None:
        if not self.worker(worker).reserved:
            self.worker(worker).run(max_jobs, fault)

    @action(when=_has_waiting, fault=faults(70, commits=2))
    def run_stock_worker(self, fault: Any) -> None:
        self.model.disturbed |= fault is not None
        run_stock_worker(self.world.faulty_redis, fault)

    @action(
        when=_has_decided,
        weight=2,
        what=st.sampled_from(["withdraw", "requeue", "discard"]),
        which=numbers,
        fault=faults(7, commits=1),
    )
    def operator(self, what: str, which: int, fault: Any) -> None:
        """Requeue or discard one rejection, or withdraw one row."""
        found = self.contents.stored.rows if what == "withdraw" else list(rejections())
        if not found:
            return
        one = found[which % len(found)]
        with Process().acting(fault), suppress(StoreUnavailable):
            self._operate(what, one)

    def _operate(self, what: str, one: Any) -> None:
        if what == "withdraw":
            with get_db() as db:
                withdraw(db, UUID(one.event_id), "wrong", "Ada")
        elif what == "requeue":
            try:
                requeue([one], self.world.faulty_redis, QUEUE)
            except HistoryError:
                if one.kind is not None:  # what is no event can only be requeued while Redis has its job
                    raise
        else:
            self.model.discarding.add(one.job_id)
            discard([one], self.world.faulty_redis, QUEUE, "not needed", "Ada")

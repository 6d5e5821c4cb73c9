"""Batches of an import with a database that refuses some or all inserts for a while, and with defects."""

from __future__ import annotations

from threading import Event
from typing import Any

import pytest
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.legacy.import_batches import ImportBatches
from consumers.worker import batch
from consumers.worker.deliveries import Delivery
from producers.acknowledgements import Outcome
from producers.events import Payload, encode, event_of
from tests.factories import a_signal, a_snapshot, an_archive

pytestmark = pytest.mark.usefixtures("database_url")

# RAISE counts the attempts: a sequence keeps its value although the transaction fails.
_REFUSING = """
    CREATE SEQUENCE attempts;
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF {when} THEN
            RAISE EXCEPTION 'not now, attempt %', nextval('attempts') USING ERRCODE = 'lock_not_available';
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON portfolio_history FOR EACH ROW EXECUTE FUNCTION refuse();
"""


def _refuse(when: str) -> None:
    """Refuse the rows for which the SQL condition is true, as PostgreSQL does if a lock is not available."""
    with get_db() as db:
        db.execute(text(_REFUSING.format(when=when)))


def _accept_all() -> None:
    with get_db() as db:
        db.execute(text("DROP TRIGGER refuse ON portfolio_history"))


def _delivery(payload: Payload, number: int) -> Delivery:
    event = event_of(payload, source="import/x/y", sequence=number)
    return Delivery(f"job-{number}", encode(event), type(event))


def _snapshots(count: int) -> list[Delivery]:
    return [_delivery(a_snapshot(portfolio_id=number), number) for number in range(count)]


class _Calls:
    """The calls of ImportBatches: outcomes by job id, and messages."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.messages: list[str] = []

    def batches(self, **options: Any) -> ImportBatches:
        return ImportBatches(decided=self.outcomes.__setitem__, say=self.messages.append, stopped=Event(), **options)

    @property
    def kinds(self) -> list[str]:
        return sorted(outcome.kind for outcome in self.outcomes.values())


def test_while_no_entry_can_be_stored_the_import_waits_and_says_it_once() -> None:
    """Both entries of the batch are tried alone too. The third time they are stored."""
    _refuse("(SELECT last_value FROM attempts) < 6")
    calls = _Calls()
    calls.batches().insert(_snapshots(2))
    assert [message.split(":")[0] for message in calls.messages] == [
        "waiting for the database",
        "the database is available again, the import continues",
    ]
    assert calls.kinds == ["stored", "stored"]


@pytest.mark.parametrize(("most_deferred", "stored"), [(3, 3), (2, 6)])
def test_entries_that_wait_alone_delay_the_others_only_if_they_are_many(most_deferred: int, stored: int) -> None:
    """Each one that waits is in memory, so their number is bounded."""
    _refuse("NEW.sequence % 2 = 1")
    calls = _Calls()

    def say(message: str) -> None:
        calls.messages.append(message)
        if message.startswith("waiting for the database"):
            _accept_all()

    batches = ImportBatches(decided=calls.outcomes.__setitem__, say=say, stopped=Event(), most_deferred=most_deferred)
    batches.insert(_snapshots(6))
    assert calls.kinds == ["stored"] * stored
    batches.finish()
    assert (calls.kinds, len(calls.messages)) == (["stored"] * 6, 2)


def test_one_transaction_has_at_most_4_mib_of_text() -> None:
    """Otherwise it would take much memory, and locks for a long time. An entry that is larger is alone."""
    sizes = [1.5, 1.5, 1.5, 4.5, 1]
    archives = [
        an_archive(portfolio_id=n, signals=[a_signal(reason="x" * round(2**20 * size))]) for n, size in enumerate(sizes)
    ]
    calls = _Calls()
    calls.batches().insert(_delivery(one, number) for number, one in enumerate(archives))
    with get_db() as db:
        versions = db.execute(text("SELECT CAST(xmin AS text) FROM signal_archives ORDER BY sequence")).scalars().all()
    first, second, third, fourth, fifth = versions
    assert (first == second, len({second, third, fourth, fifth})) == (True, 4)


def test_a_defect_that_also_prevents_the_rejection_ends_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the attempts of a worker and one more. It would repeat for ever."""
    attempts = 0

    def defective(*_: Any) -> Any:
        nonlocal attempts
        attempts += 1
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(batch, "insert_events", defective)
    batches = _Calls().batches()
    batches.insert(_snapshots(1))
    with pytest.raises(ZeroDivisionError):
        batches.finish()
    assert attempts == 4

"""Decisions about the deliveries of a batch, and what is recorded of a rejected one."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import text

from consumers.db.engine import engine, get_db
from consumers.db.inserts import Stored, insert_events
from consumers.errors import PoisonEvent, StoreUnavailable, UnsupportedJob
from consumers.ops.metrics import COUNTS
from consumers.worker import batch
from consumers.worker.batch import Deferred, Result, acknowledgements, process_batch
from consumers.worker.deliveries import Delivery
from producers.acknowledgements import Outcome
from producers.errors import SettingsError
from producers.events import (
    MAX_EVENT_BYTES,
    MAX_EVENT_STRUCTURE,
    PortfolioSnapshotEvent,
    SignalArchiveEvent,
    encode,
    event_of,
)
from tests.factories import INSTANT, a_snapshot, an_archive

pytestmark = pytest.mark.usefixtures("database_url")

SNAPSHOT, ARCHIVE = "trading.portfolio-snapshot.v1", "trading.signal-archive.v1"
UNSUPPORTED = UnsupportedJob("it is a test")


def valid(number: int, **values: Any) -> Delivery:
    event = event_of(a_snapshot(after=timedelta(number), **values), source="other/1", sequence=number)
    return Delivery(f"valid-{number}", encode(event), PortfolioSnapshotEvent)


def invalid(event_text: Any, **attributes: Any) -> Delivery:
    """Return a delivery with this text, or with an event that has these attributes and no data."""
    return Delivery("invalid", event_text or json.dumps(attributes), PortfolioSnapshotEvent)


def decided(*deliveries: Delivery) -> list[Any]:
    return [one for part in process_batch(deliveries) for one in part]


def outcomes() -> list[tuple[Any, ...]]:
    statement = text("SELECT job_id, outcome, source, sequence, event FROM event_outcomes ORDER BY job_id")
    with get_db() as db:
        return [tuple(row) for row in db.execute(statement)]


def logged(caplog: pytest.LogCaptureFixture, level: str = "INFO") -> Callable[[], list[tuple[str, str]]]:
    """Return a function that returns the level and the text of each line that is logged from now on."""
    caplog.set_level(level, logger="rq.worker.history")
    caplog.clear()
    return lambda: [(one.levelname, one.getMessage()) for one in caplog.records if one.name == "rq.worker.history"]


def test_invalid_and_unsupported_jobs_do_not_split_a_batch() -> None:
    """They are decided in its transaction. A delivery without a model has no known type."""
    archive = event_of(an_archive(), source="other/1", sequence=2)
    deliveries = [
        valid(1),
        invalid("{}"),
        Delivery("unsupported", "", None, UNSUPPORTED),
        Delivery("unknown", "{}", None),
        Delivery("archive", "", type(archive), None, archive),
        valid(1)._replace(job_id="again"),
    ]
    (results,) = process_batch(deliveries)

    assert [(one.job_id, one.label, one.event_type) for one in results if isinstance(one, Result)] == [
        ("valid-1", "stored", SNAPSHOT),
        ("invalid", "invalid", SNAPSHOT),
        ("unsupported", "unsupported", "unknown"),
        ("unknown", "invalid", "unknown"),
        ("archive", "stored", ARCHIVE),
        ("again", "duplicate", SNAPSHOT),
    ]
    assert str(results[3].error) == "event: has no known type"
    assert [row[0] for row in outcomes()] == ["invalid", "unknown", "unsupported"]  # `again` has made the row itself
    assert list(process_batch([])) == []


@pytest.mark.parametrize(
    ("argument", "recorded"),
    [
        ("text", "text"),
        (7, "7"),
        (["a", None], "['a', None]"),
        ("a\0b\ud800", "a\\x00b\\ud800"),
        (10**5000, "a int"),
        ("x" * (MAX_EVENT_BYTES + 1), "x" * MAX_EVENT_BYTES),
    ],
    ids=["text", "number", "list", "unstorable", "huge number", "too long"],
)
def test_any_argument_of_a_rejected_job_is_recorded_as_text(argument: Any, recorded: str) -> None:
    """Characters that PostgreSQL cannot store become escapes."""
    (result,) = decided(Delivery("job", argument, None, UNSUPPORTED))
    assert (result.failed, result.outcome.reason) == (True, str(UNSUPPORTED))
    assert outcomes() == [("job", "rejected", None, None, recorded)]


EVENT_ID = "7f0a1c52-5d0e-5c3a-9f6b-2f6b1c9d8e7f"


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"source": "other/1", "sequence": f"{7:019}", "id": EVENT_ID}, ("other/1", 7, EVENT_ID)),
        ({"source": "other/1", "sequence": "seven", "id": "x"}, ("other/1", None, None)),
        ({"source": 5, "sequence": f"{7:019}", "id": EVENT_ID}, (None, 7, EVENT_ID)),
        ({}, (None, None, None)),
    ],
)
def test_an_invalid_event_is_acknowledged_by_what_can_be_read_of_it(
    attributes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    """Its producer gets an acknowledgement if its source and number are readable."""
    (result,) = decided(invalid(None, **attributes))
    assert (result.source, result.sequence, result.event_id and str(result.event_id)) == expected
    answer = ["invalid", f"{expected[2]} rejected:{result.outcome.reason}"]
    assert acknowledgements([result]) == ({"other/1": answer} if expected[:2] == ("other/1", 7) else {})


@pytest.mark.parametrize("missing", ["nothing", "source", "sequence", "id"])
def test_a_poison_event_without_a_row_is_rejected_whatever_attributes_it_lacks(missing: str) -> None:
    """Without a source, a number or an id, nothing can show that it was."""
    attributes = {"source": "other/1", "sequence": f"{7:019}", "id": EVENT_ID}
    attributes.pop(missing, "")
    (result,) = decided(invalid(None, **attributes)._replace(error=PoisonEvent(3)))
    assert (result.label, result.failed) == ("poison", True)


@pytest.mark.parametrize("broken", ["", "[1, 2]", "not JSON", '{"source": "other/1"', "7"])
def test_nothing_is_read_of_a_text_that_is_no_json_object(broken: str) -> None:
    """It is rejected all the same."""
    (result,) = decided(Delivery("invalid", broken, PortfolioSnapshotEvent))
    assert (result.label, result.source, result.sequence, result.event_id) == ("invalid", None, None, None)


def test_of_a_text_that_could_exhaust_memory_only_the_beginning_is_read() -> None:
    """Our events begin with their id, source and sequence."""
    start = f'{{"id": "{EVENT_ID}", "source": "other/1", "sequence": "{7:019}", "data": '
    (result,) = decided(invalid(start + "[" + "1," * MAX_EVENT_STRUCTURE))
    assert (result.source, result.sequence, str(result.event_id)) == ("other/1", 7, EVENT_ID)


def test_an_instant_is_stored_in_any_offset_of_rfc_3339() -> None:
    """PostgreSQL itself reads offsets up to 15:59 only."""
    farthest = timezone(timedelta(hours=23, minutes=59))
    archive = an_archive(archived_at=INSTANT.astimezone(farthest))
    (result,) = decided(Delivery("job", encode(event_of(archive, source="other/1", sequence=1)), SignalArchiveEvent))
    assert result.label == "stored"
    with get_db() as db:
        assert db.scalar(text("SELECT archived_at FROM signal_archives")) == INSTANT


def test_an_archive_in_another_zone_is_a_duplicate_although_its_month_differs() -> None:
    """Its month follows the offset in which the same instant is written; it is not content."""
    instant = datetime(2026, 11, 30, 23, 30, tzinfo=UTC)
    zones = [UTC, timezone(timedelta(hours=1))]
    archives = [an_archive(archived_at=instant.astimezone(zone)) for zone in zones]
    assert [one.archive_month for one in archives] == ["2026-11", "2026-12"]
    events = [event_of(archive, source="other/1", sequence=n) for n, archive in enumerate(archives)]
    results = decided(*(Delivery(f"job-{n}", encode(event), SignalArchiveEvent) for n, event in enumerate(events)))
    assert [one.label for one in results] == ["stored", "duplicate"]


def test_a_batch_is_counted_with_its_duration_and_the_age_of_each_stored_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of an import are old, so their age is left out. By clocks that differ, an event may be in the future."""
    counted: list[Any] = []
    monkeypatch.setattr(COUNTS, "batch", lambda *figures: counted.append(figures))
    now = datetime.now(UTC)
    events = [
        event_of(a_snapshot(timestamp=now + timedelta(seconds=seconds)), source=source, sequence=1)
        for seconds, source in ((-100, "other/1"), (100, "other/1"), (-50, "import/a.json/0a1b"), (-100, "other/2"))
    ]
    deliveries = [Delivery(f"job-{n}", encode(event), PortfolioSnapshotEvent) for n, event in enumerate(events)]
    decided(*deliveries, invalid("{}"))
    ((outcomes_counted, seconds, ages),) = counted
    assert outcomes_counted == {(SNAPSHOT, "stored"): 3, (SNAPSHOT, "duplicate"): 1, (SNAPSHOT, "invalid"): 1}
    assert 0 < seconds < 60
    assert ages == [pytest.approx(100, abs=30), 0.0]


def test_acknowledgements_are_grouped_by_source_and_need_a_number() -> None:
    """An event without a number has no outbox that waits for an answer. An unreadable event id is a hyphen."""
    stored, rejected = Outcome("stored", 5), Outcome("rejected", reason="why")
    results = [
        Result("a", stored, "one/1", 1, None, None, SNAPSHOT),
        Result("b", stored, "two/2", 1, None, None, SNAPSHOT),
        Result("c", rejected, "one/1", 0, None, None, SNAPSHOT, UNSUPPORTED),
        Result("d", stored, "one/1", None, None, None, SNAPSHOT),
        Result("e", stored, None, 3, None, None, SNAPSHOT),
    ]
    assert acknowledgements(results) == {
        "one/1": ["a", "- stored:5", "c", "- rejected:why"],
        "two/2": ["b", "- stored:5"],
    }


def test_an_event_that_cannot_be_decided_alone_is_deferred_with_its_reason() -> None:
    """The others are stored, and nothing is recorded of it."""
    with get_db() as db:
        db.exec_driver_sql(
            "CREATE FUNCTION rule() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN IF NEW.sequence = 2 THEN RETURN NULL; END IF; RETURN NEW; END $$;"
            " CREATE TRIGGER rule BEFORE INSERT ON portfolio_history FOR EACH ROW EXECUTE FUNCTION rule()"
        )
    results = decided(*map(valid, range(5)))
    (deferred,) = (one for one in results if isinstance(one, Deferred))
    assert isinstance(deferred.error, StoreUnavailable)
    event = event_of(a_snapshot(after=timedelta(2)), source="other/1", sequence=2)
    assert deferred[:1] + deferred[2:] == ("valid-2", "other/1", 2, event.id, None, SNAPSHOT)
    assert sorted(one.job_id for one in results if isinstance(one, Result)) == [f"valid-{n}" for n in (0, 1, 3, 4)]
    assert outcomes() == []


@pytest.mark.parametrize("error", [StoreUnavailable("an outage"), SettingsError("no database"), KeyboardInterrupt()])
def test_an_error_that_no_delivery_causes_is_raised_and_no_delivery_is_tried_alone(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Every other delivery would fail too."""
    tried = []

    def failing(_db: Any, events: Any) -> Any:
        tried.append(len(events))
        raise error

    monkeypatch.setattr(batch, "insert_events", failing)
    with pytest.raises(type(error)) as caught:
        decided(valid(1), valid(2))
    assert (caught.value, tried) == (error, [2])


@pytest.mark.parametrize(("used", "name"), [(batch, "decode"), (json, "loads"), (COUNTS, "batch")])
def test_a_keyboard_interrupt_is_raised_at_any_step(monkeypatch: pytest.MonkeyPatch, used: object, name: str) -> None:
    """A person ends the worker while it reads an event, reads what it can of an invalid one, or counts the results."""

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(used, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        decided(invalid("{}"))


def test_values_that_the_table_refuses_reject_only_their_event() -> None:
    """The record has the text of the event."""
    with get_db() as db:
        db.exec_driver_sql("ALTER TABLE portfolio_history ADD CONSTRAINT unlucky CHECK (balance <> 13)")
    deliveries = [valid(1), valid(2, balance=13), valid(3)]
    results = decided(*deliveries)
    assert {one.job_id: one.label for one in results} == {
        "valid-1": "stored",
        "valid-2": "invalid",
        "valid-3": "stored",
    }
    assert outcomes() == [("valid-2", "rejected", "other/1", 2, deliveries[1].text)]


@pytest.mark.parametrize("discarded_before", [False, True])
def test_a_repeated_delivery_of_a_discarded_rejection_does_not_fail_again(
    caplog: pytest.LogCaptureFixture, discarded_before: bool
) -> None:
    """Its delivery stays rejected, leaves the registry of failed jobs, and is no error in the log."""
    (first,) = decided(Delivery("job", "x", None, UNSUPPORTED))
    if discarded_before:
        with get_db() as db:
            db.exec_driver_sql("UPDATE event_outcomes SET outcome = 'discarded', reason = 'known', actor = 'alice'")
    lines = logged(caplog)
    (again, other) = decided(Delivery("job", "x", None, UNSUPPORTED), Delivery("other", "y", None, UNSUPPORTED))
    assert (first.failed, again.failed, other.failed) == (True, not discarded_before, True)
    assert again.label == ("discarded" if discarded_before else "unsupported")
    assert lines()[0] == (
        ("INFO", "job job was discarded before and stays rejected")
        if discarded_before
        else ("ERROR", f"rejected job job: {UNSUPPORTED}")
    )
    (alone,) = decided(Delivery("job", "x", None, UNSUPPORTED))
    assert alone.failed is not discarded_before
    assert [row[1] for row in outcomes()] == ["discarded" if discarded_before else "rejected", "rejected"]


@pytest.mark.parametrize("outcome", ["rejected", "discarded"])
def test_a_delivery_that_is_stored_later_is_no_longer_rejected_or_discarded(outcome: str) -> None:
    decided(Delivery("job", "x", None, UNSUPPORTED), Delivery("other", "y", None, UNSUPPORTED))
    with get_db() as db:
        db.exec_driver_sql(f"UPDATE event_outcomes SET outcome = '{outcome}', actor = 'alice'")
    (stored,) = decided(valid(1)._replace(job_id="job"))
    assert (stored.label, [row[0] for row in outcomes()]) == ("stored", ["other"])


def test_events_of_one_kind_do_not_wait_for_a_lock_on_the_table_of_the_other_kind(database_url: str) -> None:
    """Withdrawing an archive, for example, takes this lock."""
    with engine().begin() as other:
        other.exec_driver_sql("LOCK TABLE signal_archives IN SHARE ROW EXCLUSIVE MODE")
        with get_db() as db:
            db.exec_driver_sql("SET LOCAL lock_timeout = '100ms'")
            (result,) = insert_events(db, [event_of(a_snapshot(), source="other/1", sequence=1)])
    assert isinstance(result, Stored)
    assert result.created


def test_a_duplicate_is_recorded_unless_the_same_delivery_made_the_row() -> None:
    """So each number of each source has a row or an outcome. The record has no text: the row has the content."""
    first = event_of(a_snapshot(), source="other/1", sequence=1)
    for job_id, event in (("first", first), ("again", first), ("copy", first.model_copy(update={"source": "other/2"}))):
        decided(Delivery(job_id, encode(event), PortfolioSnapshotEvent))
    assert outcomes() == [("copy", "duplicate", "other/2", 1, None)]


def test_a_single_event_is_logged_with_its_row_and_a_batch_with_its_totals(caplog: pytest.LogCaptureFixture) -> None:
    """Each rejection is logged as an error."""
    caplog.set_level("INFO", logger="rq.worker.history")
    (stored,) = decided(valid(1))
    same = event_of(a_snapshot(after=timedelta(1)), source="other/2", sequence=1)
    decided(Delivery("again", encode(same), PortfolioSnapshotEvent))
    decided(valid(2), invalid("{}"), valid(3), Delivery("job", "x", None, UNSUPPORTED))
    records = [record for record in caplog.records if record.name == "rq.worker.history"]
    lines = [record.getMessage() for record in records]
    row = f"as row {stored.outcome.row_id}"
    assert lines[0].startswith(f"stored event {stored.event_id}: ")
    assert lines[1].startswith(f"duplicate event {stored.event_id}: ")
    assert lines[0].endswith(row)
    assert lines[1].endswith(row)
    assert lines[2].startswith("rejected job invalid: specversion: is missing")
    assert lines[3] == f"rejected job job: {UNSUPPORTED}"
    facts = [(one.__dict__["job_id"], one.__dict__["outcome"], one.__dict__["sequence"]) for one in records[:3]]
    assert facts == [("valid-1", "stored", 1), ("again", "duplicate", 1), ("invalid", "invalid", None)]
    assert lines[4:] == ["stored 2 events, 0 duplicates, 2 rejected"]


def test_each_accepted_event_of_a_batch_is_logged_only_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    """At INFO, a batch of hundreds is one line. A conflict has no row to name."""
    lines = logged(caplog, "DEBUG")
    decided(valid(1), valid(1)._replace(job_id="again"))
    decided(valid(1, balance=5)._replace(job_id="conflict"))
    assert [(level, line.partition(":")[0].partition(" event ")[0]) for level, line in lines()] == [
        ("INFO", "stored 1 events, 1 duplicates, 0 rejected"),
        ("DEBUG", "stored"),
        ("DEBUG", "duplicate"),
        ("ERROR", "rejected job conflict"),
    ]

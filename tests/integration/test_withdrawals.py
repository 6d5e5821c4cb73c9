"""A withdrawn row leaves its table, its content is kept and stays out, and the corrected fact may be recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from redis import Redis
from sqlalchemy import Connection, make_url, text

from consumers.db import engine as db_engine
from consumers.db.engine import engine, get_db
from consumers.db.inserts import Stored, find_row, insert_event, insert_events
from consumers.db.withdrawals import Withdrawal, withdraw
from consumers.errors import EventConflict, EventWithdrawn, PoisonEvent, WithdrawalRefused
from consumers.operations import get_portfolio_history, insert_portfolio_history_snapshot, insert_signal_archive
from consumers.ops.audit import SourceAudit, audit
from consumers.ops.failed import requeue
from consumers.ops.rejections import rejections
from consumers.worker.batch import Result, process_batch
from consumers.worker.deliveries import Delivery
from producers.errors import EventRejected
from producers.events import KINDS, Event, PortfolioSnapshot, SignalArchive, encode, event_of
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from tests.deliveries import burst, history_queue
from tests.factories import INSTANT, a_signal, a_snapshot, an_archive
from tests.rq_programs import somebody_waits_for_a_lock, until

_SOURCE = "bot/5a0c"
_REASON = "the balance was read before the deposit"


def _execute(statement: str) -> list[Any]:
    with get_db() as db:
        result = db.execute(text(statement))
        return list(result) if result.returns_rows else []


def _event(payload: PortfolioSnapshot | SignalArchive, sequence: int | None = 1, *, source: str = _SOURCE) -> Event:
    return event_of(payload, source=source, sequence=sequence)


def _delivery(event: Event, nonce: str = "00000000000000aa") -> Delivery:
    job_id = f"{event.source.rpartition('/')[2]}-{event.sequence}-{nonce}"
    return Delivery(job_id, encode(event), KINDS[event.type].model, None)


def _process(*events: Event) -> list[Result]:
    results = [result for part in process_batch([_delivery(event) for event in events]) for result in part]
    assert all(isinstance(result, Result) for result in results)
    return results  # type: ignore[return-value]  # checked above


def _withdraw(event_id: UUID, reason: str = _REASON, actor: str = "alice") -> Withdrawal:
    with get_db() as db:
        return withdraw(db, event_id, reason, actor)


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "consumers.cli", *arguments],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def _balances() -> list[float]:
    return [row["balance"] for row in get_portfolio_history()]


def test_a_withdrawn_snapshot_is_kept_with_exact_values(database_url: str) -> None:
    """Amounts are strings with every digit, times have an offset, and the row is named."""
    snapshot = a_snapshot(balance="123456789012.00000001", total_invested="0.1")
    row_id = insert_event(_event(snapshot, 7))
    (created_at,) = _execute("SELECT created_at FROM portfolio_history")[0]
    returned = _withdraw(snapshot.event_id)

    (kept,) = _execute("SELECT *, CAST(content AS text) AS exact FROM withdrawals")
    assert _execute("SELECT * FROM portfolio_history") == []
    assert kept.content == {
        "portfolio_id": 1,
        "snapshot_date": "2026-11-22",
        "timestamp": "2026-11-22T17:02:46.101234+00:00",
        "balance": "123456789012.00000001",
        "total_invested": "0.1",
        "total_profit_loss": "197.25",
        "total_value": "10097.37",
        "open_positions": 1,
        "trade_count": 2,
    }
    assert (kept.event_id, kept.source, kept.sequence, kept.row_id) == (snapshot.event_id, _SOURCE, 7, row_id)
    assert (kept.reason, kept.actor, kept.created_at) == (_REASON, "alice", created_at)
    assert kept.withdrawn_at > created_at
    assert kept.job_id is None  # the history tables do not have it
    assert (returned.table, returned.row_id, returned.content) == ("portfolio_history", row_id, kept.content)


def test_a_withdrawn_archive_keeps_every_digit_of_its_signals(database_url: str) -> None:
    """As JSONB, by value as it arrived. An imported row has the job id that its entry always has."""
    signals = [a_signal(price=Decimal("0.12345678901234567890123")), {"market_id": "ü", "n": 12345678901234567890}]
    archive = an_archive(signals=signals, portfolio_id=None)
    insert_event(_event(archive, 3, source="import/a.json/0a1b"))
    insert_event(_event(a_snapshot()))  # of another table, which stays
    before = _execute("SELECT CAST(signals_data AS text) FROM signal_archives")
    _withdraw(archive.event_id)
    (kept,) = _execute("SELECT job_id, content, CAST(content -> 'signals_data' AS text) AS signals FROM withdrawals")
    assert [(kept.signals,)] == [tuple(row) for row in before]
    assert "0.12345678901234567890123" in kept.signals
    assert {name: value for name, value in kept.content.items() if name != "signals_data"} == {
        "portfolio_id": None,
        "archived_at": "2026-11-22T17:02:46.101234+00:00",
        "archive_month": "2026-11",
        "signals_count": 2,
    }
    assert kept.job_id == "0a1b-3"
    assert len(_balances()) == 1


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (a_snapshot(balance=1), a_snapshot(balance=2)),
        (an_archive(), an_archive(signals=[a_signal(action="sell_yes")])),
    ],
    ids=["snapshot", "archive"],
)
def test_withdrawn_content_stays_out_and_the_corrected_fact_is_stored(
    database_url: str, wrong: Any, right: Any
) -> None:
    """Under the same event id. A delivery of the corrected content is a duplicate, other content is a conflict."""
    insert_event(_event(wrong))
    _withdraw(wrong.event_id)
    with pytest.raises(EventWithdrawn, match=f"^withdrawn: .*{wrong.event_id}.* by alice at .*Z: {_REASON}$"):
        insert_event(_event(wrong, 2))
    row_id = insert_event(_event(right, 3))
    with pytest.raises(EventWithdrawn):
        insert_event(_event(wrong, 2))
    assert insert_event(_event(right, 4)) == row_id
    changed: dict[str, Any] = {"trade_count": 9} if isinstance(wrong, PortfolioSnapshot) else {"signals": [{}]}
    other = type(wrong).checked(**{**dict(wrong), **changed})
    with pytest.raises(EventConflict):
        insert_event(_event(other, 5))

    _withdraw(wrong.event_id, "the deposit was wrong too")
    for content, reason in ((wrong, _REASON), (right, "the deposit was wrong too")):
        with pytest.raises(EventWithdrawn, match=reason):
            insert_event(_event(content, 6))
    insert_event(_event(other, 7))


def test_content_is_compared_by_value(database_url: str) -> None:
    """10 equals 10.0, and the same instant in another zone is the same instant; another date is other content."""
    insert_event(_event(a_snapshot(balance="10")))
    _withdraw(a_snapshot().event_id)
    tokyo = INSTANT.astimezone(timezone(timedelta(hours=9)))
    with pytest.raises(EventWithdrawn):
        insert_event(_event(a_snapshot(balance="10.00000000", timestamp=tokyo)))
    insert_event(_event(a_snapshot(balance="10", snapshot_date=tokyo.date())))


def test_signals_are_compared_by_value(database_url: str) -> None:
    insert_event(_event(an_archive(signals=[{"price": 10, "at": None}])))
    _withdraw(an_archive().event_id)
    with pytest.raises(EventWithdrawn):
        insert_event(_event(an_archive(signals=[{"at": None, "price": Decimal("10.0")}])))
    insert_event(_event(an_archive(signals=[{"price": 10}])))


def test_a_withdrawn_archive_stays_out_in_the_month_of_another_offset(database_url: str) -> None:
    """Its month is not content: it follows the offset in which the same instant is written."""
    last_hour = datetime(2026, 11, 30, 23, 30, tzinfo=UTC)
    archives = [
        SignalArchive(archived_at=last_hour.astimezone(timezone(timedelta(hours=hours))), signals=[{"a": 1}])
        for hours in (0, 1)
    ]
    assert [archive.archive_month for archive in archives] == ["2026-11", "2026-12"]
    insert_event(_event(archives[0]))
    _withdraw(archives[0].event_id)
    with pytest.raises(EventWithdrawn):
        insert_event(_event(archives[1]))


def test_one_batch_may_have_withdrawn_corrected_and_conflicting_content(database_url: str) -> None:
    """Whichever comes first, each delivery gets its own answer."""
    contents = [a_snapshot(balance=balance) for balance in (1, 2, 3, 2)]
    for content in contents[:2]:
        insert_event(_event(content))
        _withdraw(content.event_id)
    with get_db() as db:
        answers = insert_events(
            db, [_event(content, 10 + n) for n, content in enumerate([*contents, a_snapshot(balance=4)])]
        )
    assert [type(answer) for answer in answers] == [
        EventWithdrawn, EventWithdrawn, Stored, EventWithdrawn, EventConflict,
    ]  # fmt: skip
    assert _balances() == [3]


def test_a_second_delivery_of_the_withdrawn_row_is_rejected_without_another_record(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The withdrawal is the record of this delivery, and its rejection is no error in the log.

    Another delivery of the same content is a recorded rejection.
    """
    caplog.set_level("INFO", logger="rq.worker.history")
    event, copy = _event(a_snapshot(), 1), _event(a_snapshot(), 8, source="copy/77")
    _process(event)
    _withdraw(event.id)
    own, other = _process(event, copy)
    assert own.outcome.kind == other.outcome.kind == "rejected"
    assert own.outcome.reason == other.outcome.reason
    assert str(own.outcome.reason).startswith("withdrawn: ")
    assert (own.label, own.failed, other.failed) == ("withdrawn", False, True)
    lines = [(one.levelname, one.getMessage()) for one in caplog.records if one.name == "rq.worker.history"]
    assert lines[1:3] == [
        ("INFO", f"job {own.job_id} is rejected again: {own.outcome.reason}"),
        ("ERROR", f"rejected job {other.job_id}: {other.outcome.reason}"),
    ]
    assert [(one.source, one.sequence, one.reason) for one in rejections()] == [("copy/77", 8, own.outcome.reason)]
    assert [(one.source, one.stored, one.rejected, one.withdrawn, one.missing) for one in audit()] == [
        (_SOURCE, 0, 0, 1, []),
        ("copy/77", 0, 1, 0, [(1, 7)]),
    ]


def test_an_event_without_a_number_is_a_recorded_rejection(database_url: str) -> None:
    """Without it, nothing shows that the same delivery made the withdrawn row."""
    event = _event(a_snapshot(), None)
    _process(event)
    _withdraw(event.id)
    (result,) = _process(event)
    assert result.failed
    assert len(list(rejections())) == 1


def test_a_poison_event_whose_row_was_withdrawn_is_not_recorded_twice(database_url: str) -> None:
    """Its worker crashed between the commit and the acknowledgement."""
    event = _event(a_snapshot())
    _process(event)
    _withdraw(event.id)
    ((result,),) = process_batch([_delivery(event)._replace(error=PoisonEvent(3))])
    assert isinstance(result, Result)
    assert (result.outcome.kind, str(result.outcome.reason)[:11]) == ("rejected", "withdrawn: ")
    assert (result.failed, list(rejections())) == (False, [])


def test_a_row_or_its_withdrawal_is_found_by_source_number_and_event_together(database_url: str) -> None:
    """Copies of an outbox use one number for several events, and one event may come from several sources."""
    event, other = _event(a_snapshot(), 7), a_snapshot(after=timedelta(hours=1)).event_id
    row_id = insert_event(event)
    others = [("copy/77", 7, event.id), (_SOURCE, 8, event.id), (_SOURCE, 7, other)]

    def found() -> list[Any]:
        with get_db() as db:
            return [find_row(db, *delivery) for delivery in ((_SOURCE, 7, event.id), *others)]

    assert found() == [row_id, None, None, None]
    _withdraw(event.id)
    insert_event(_event(a_snapshot(balance=5), 7))
    _withdraw(event.id, "the copy was wrong too")
    own, *rest = found()
    assert (type(own), own.own, rest) == (EventWithdrawn, True, [None] * 3)


@pytest.fixture
def audited(producer: HistoryProducer, redis: Redis) -> Callable[[], SourceAudit]:
    def audited() -> SourceAudit:
        (one,) = audit(redis, Outbox(producer._transport.outbox.path))
        return one

    return audited


@pytest.mark.parametrize("stock", [False, True], ids=["HistoryWorker", "stock worker"])
def test_a_resend_does_not_bring_the_withdrawn_row_back(
    producer: HistoryProducer, redis: Redis, work: Callable[[], None], audited: Callable[[], SourceAudit], stock: bool
) -> None:
    """The outbox settles it as rejected, nothing is listed as failed, and the receipt of before stays true."""
    run: Callable[[], Any] = work if stock else lambda: burst(redis)
    wrong, fine = producer.record(a_snapshot()), producer.record(an_archive())
    producer.flush(5)
    run()
    row_id = wrong.wait(5)
    fine.wait(5)
    _withdraw(UUID(str(wrong.event_id)))
    assert (wrong.state, wrong.wait(0)) == ("stored", row_id)
    assert (audited().stored, audited().withdrawn, audited().missing, audited().mismatched) == (1, 1, [], [])

    for _ in range(2):
        outbox = Outbox(producer._transport.outbox.path)
        outbox.resend(time.time() - 3600)
        producer.flush(5)
        run()
        until(lambda: (producer.status().pending, producer.status().sent) == (0, 0))
        with pytest.raises(EventRejected, match="withdrawn: "):
            wrong.wait(5)
    assert (producer.status().stored, producer.status().rejected) == (1, 1)
    assert (list(rejections()), history_queue(redis).failed_job_registry.count) == ([], 0)
    one = audited()
    assert (one.stored, one.rejected, one.withdrawn, one.complete) == (1, 0, 1, True)

    corrected = producer.record(a_snapshot(balance=5))
    producer.flush(5)
    run()
    corrected.wait(5)
    assert _balances() == [5]
    assert (audited().stored, audited().withdrawn, audited().complete) == (2, 1, True)


def test_a_conflict_is_stored_by_a_requeue_after_the_wrong_row_was_withdrawn(
    producer: HistoryProducer, redis: Redis, work: Callable[[], None]
) -> None:
    """And the withdrawn content, requeued, stays rejected."""
    wrong, right = producer.record(a_snapshot(balance=1)), producer.record(a_snapshot(balance=2))
    producer.flush(5)
    burst(redis)
    wrong.wait(5)
    with pytest.raises(EventRejected, match="with other content"):
        right.wait(5)
    _withdraw(a_snapshot().event_id)
    copied = producer.record(a_snapshot(balance=1))
    producer.flush(5)
    assert requeue(rejections(), redis, "history") == 1
    burst(redis)
    until(lambda: (right.state, copied.state) == ("stored", "rejected"))
    assert [one.reason[:11] for one in rejections()] == ["withdrawn: "]
    assert requeue(rejections(), redis, "history") == 1
    burst(redis)
    assert [one.reason[:11] for one in rejections()] == ["withdrawn: "]
    assert _balances() == [2]


def test_direct_inserts_of_withdrawn_content_raise(database_url: str) -> None:
    amounts = dict.fromkeys(("balance", "total_invested", "total_profit_loss", "total_value"), 1)
    snapshot = {"timestamp": INSTANT, **amounts, "open_positions": 0, "trade_count": 0}
    archive = {"archived_at": INSTANT, "signals": [{"market_id": "1"}]}
    insert_portfolio_history_snapshot(snapshot)
    insert_signal_archive(archive)
    for table in ("portfolio_history", "signal_archives"):
        ((event_id,),) = _execute(f"SELECT event_id FROM {table}")
        _withdraw(event_id)
    with pytest.raises(EventWithdrawn):
        insert_portfolio_history_snapshot(snapshot)
    with pytest.raises(EventWithdrawn):
        insert_signal_archive(archive)
    insert_portfolio_history_snapshot(snapshot | {"balance": 2})


# ---- two connections


@contextmanager
def _in_other_threads() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(4) as threads:
        yield threads.submit


@contextmanager
def _connection() -> Iterator[Connection]:
    with db_engine.translated_errors(engine()), engine().begin() as db:
        yield db


@pytest.fixture(params=["read committed", "serializable"])
def isolation(database_url: str, request: pytest.FixtureRequest) -> None:
    """The isolation level that the database sets for its sessions."""
    name = make_url(database_url).database
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_isolation = '{request.param}'")
    engine().dispose()


@pytest.mark.usefixtures("isolation")
def test_content_that_arrives_during_its_withdrawal_stays_out() -> None:
    """The insert waits for the withdrawal, and sees it although it began before the commit."""
    wrong, other = _event(a_snapshot(), 1), _event(a_snapshot(after=timedelta(hours=1)), 2)
    insert_event(wrong)
    with _in_other_threads() as start:
        with _connection() as db:
            withdraw(db, wrong.id, _REASON, "alice")
            resent = start(_process, other, wrong)
            until(somebody_waits_for_a_lock)
            assert not resent.done()
        stored, rejected = sorted(resent.result(20), key=lambda one: one.sequence != 2)
    assert (stored.outcome.kind, rejected.outcome.kind) == ("stored", "rejected")
    assert str(rejected.outcome.reason).startswith("withdrawn: ")
    assert [row["sequence"] for row in get_portfolio_history()] == [2]


@pytest.mark.usefixtures("isolation")
def test_corrected_content_that_arrives_during_the_withdrawal_is_stored() -> None:
    """Without the wait it would be a conflict with a row that is gone."""
    wrong, right = _event(a_snapshot(balance=1), 1), _event(a_snapshot(balance=2), 2)
    insert_event(wrong)
    with _in_other_threads() as start:
        with _connection() as db:
            withdraw(db, wrong.id, _REASON, "alice")
            inserted = start(insert_event, right)
            until(somebody_waits_for_a_lock)
        inserted.result(20)
    assert _balances() == [2]


@pytest.mark.usefixtures("isolation")
def test_a_withdrawal_waits_for_a_batch_that_inserts() -> None:
    """The batch has found the row and reports it as a duplicate, which is true when it commits."""
    wrong, other = _event(a_snapshot(), 1), _event(a_snapshot(after=timedelta(hours=1)), 2)
    row_id = insert_event(wrong)
    with _in_other_threads() as start:
        with _connection() as db:
            assert insert_events(db, [other, wrong])[1] == Stored(row_id, False, _SOURCE, 1)
            withdrawn = start(_withdraw, wrong.id)
            until(somebody_waits_for_a_lock)
            assert not withdrawn.done()
        assert withdrawn.result(20).row_id == row_id
    assert [row["sequence"] for row in get_portfolio_history()] == [2]


@pytest.mark.usefixtures("isolation")
def test_of_two_withdrawals_at_once_one_wins() -> None:
    """The other says who was first."""
    event = _event(a_snapshot())
    insert_event(event)
    with _in_other_threads() as start:
        with _connection() as db:
            withdraw(db, event.id, _REASON, "alice")
            second = start(_withdraw, event.id, "another reason", "bob")
            until(somebody_waits_for_a_lock)
        with pytest.raises(WithdrawalRefused, match=f"already withdrawn by alice at .*Z: {_REASON}"):
            second.result(20)
    assert _execute("SELECT actor FROM withdrawals") == [("alice",)]


def test_a_withdrawal_that_is_rolled_back_changes_nothing(database_url: str) -> None:
    event = _event(a_snapshot())
    row_id = insert_event(event)
    with engine().connect() as db:
        withdraw(db, event.id, _REASON, "alice")
        db.rollback()
    assert insert_event(event) == row_id
    assert _execute("SELECT * FROM withdrawals") == []


# ---- errors and the command


def test_error_says_why_the_event_has_no_row(database_url: str) -> None:
    missing, wrong = a_snapshot().event_id, _event(a_snapshot(balance=1))
    with pytest.raises(
        WithdrawalRefused, match=f"^no row has the event id {missing}: .*trading-history history --json"
    ):
        _withdraw(missing)
    _process(_event(a_snapshot(balance=1)))
    _process(_event(a_snapshot(balance=2), 2))
    _withdraw(wrong.id)
    with pytest.raises(
        WithdrawalRefused, match=f"event id {wrong.id}: it was already withdrawn by alice at .*{_REASON}"
    ):
        _withdraw(wrong.id)
    for number, reason in enumerate(("the second", "the third"), start=3):
        _process(_event(a_snapshot(balance=number), number))
        _withdraw(wrong.id, reason)
    with pytest.raises(WithdrawalRefused, match="it was already withdrawn by alice at .*: the third$"):
        _withdraw(wrong.id)
    other = a_snapshot(after=timedelta(hours=1)).event_id
    with pytest.raises(WithdrawalRefused, match=f"event id {other}: see trading-history history --json"):
        _withdraw(other)
    _execute("DELETE FROM withdrawals")
    _execute(
        "INSERT INTO event_outcomes (job_id, event_id, outcome, reason, created_at) SELECT n, event_id, outcome,"
        " 'older', created_at - interval '1 hour' FROM event_outcomes, unnest(ARRAY['0', 'z']) AS n"
    )
    _execute("UPDATE event_outcomes SET created_at = now() WHERE reason <> 'older'")  # its row is now the last one
    with pytest.raises(WithdrawalRefused, match="it was rejected: event .* with other content; .*failed show"):
        _withdraw(wrong.id)
    _execute("UPDATE event_outcomes SET outcome = 'discarded'")
    with pytest.raises(WithdrawalRefused, match=f"event id {wrong.id}: see trading-history history --json"):
        _withdraw(wrong.id)
    for reason, actor in (("", "alice"), (" \n", "alice"), ("why", " ")):
        with pytest.raises(ValueError, match="must not be empty"):
            _withdraw(wrong.id, reason, actor)


@pytest.mark.parametrize("granted", ["SELECT ON withdrawals", "DELETE ON portfolio_history", "INSERT ON withdrawals"])
def test_a_role_without_both_rights_may_not_withdraw(database_url: str, granted: str) -> None:
    """It needs DELETE on the history table and INSERT on withdrawals, as the owner has."""
    event = _event(a_snapshot())
    insert_event(event)
    refused = pytest.raises(
        WithdrawalRefused, match="^role trading_history_writer may not withdraw a row of portfolio_"
    )
    with refused, get_db() as db:
        db.exec_driver_sql(f"GRANT {granted} TO trading_history_writer")
        db.exec_driver_sql("SET LOCAL ROLE trading_history_writer")
        withdraw(db, event.id, _REASON, "alice")
    assert len(_balances()) == 1


@pytest.mark.parametrize("shape", ["table", "json"])
def test_the_command_withdraws_a_row(database_url: str, shape: str) -> None:
    """The actor is by default the account that runs it. With --dry-run, nothing changes."""
    event = _event(a_snapshot())
    row_id = insert_event(event)
    options = ["--json"] if shape == "json" else []
    dry = _run("withdraw", str(event.id), "--reason", _REASON, "--dry-run", *options, LOGNAME="carol")
    assert (dry.returncode, dry.stderr, _execute("SELECT * FROM withdrawals"), len(_balances())) == (0, "", [], 1)
    done = _run("withdraw", str(event.id), "--reason", _REASON, *options, LOGNAME="carol")
    assert (done.returncode, done.stderr, _balances()) == (0, "", [])
    assert _execute("SELECT actor, reason, row_id FROM withdrawals") == [("carol", _REASON, row_id)]
    if shape == "json":
        printed = json.loads(done.stdout)
        assert printed["content"]["balance"] == "9900.12"
        assert (printed["event_id"], printed["table"], printed["row_id"]) == (
            str(event.id),
            "portfolio_history",
            row_id,
        )
        assert (printed["actor"], printed["reason"], printed["sequence"]) == ("carol", _REASON, 1)
        assert json.loads(dry.stdout).keys() == printed.keys()
    else:
        assert done.stdout.splitlines()[-1] == f"Row {row_id} of portfolio_history was withdrawn."
        assert (
            dry.stdout.splitlines()[-1] == f"Row {row_id} of portfolio_history would be withdrawn; nothing was changed."
        )
        assert "9900.12" in dry.stdout


def test_errors_of_the_command_are_one_line(database_url: str) -> None:
    event_id = str(a_snapshot().event_id)
    missing = _run("withdraw", event_id, "--reason", "why")
    wrong_id = _run("withdraw", "12", "--reason", "why")
    without_reason = _run("withdraw", event_id)
    blank = _run("withdraw", event_id, "--reason", " ")
    assert [run.returncode for run in (missing, wrong_id, without_reason, blank)] == [1, 2, 2, 2]
    for run in (missing, wrong_id, without_reason, blank):
        assert (run.stdout, len(run.stderr.splitlines())) == ("", 1), run.stderr
    assert "12 is not an event id" in wrong_id.stderr
    assert "--reason" in without_reason.stderr


def test_withdrawing_does_not_wait_for_ever(database_url: str) -> None:
    """A lock that another session keeps ends the command after 5 s, so that inserts do not queue behind it."""
    event = _event(a_snapshot())
    insert_event(event)
    with _connection() as db:
        db.exec_driver_sql("LOCK TABLE portfolio_history IN ROW EXCLUSIVE MODE")
        run = _run("withdraw", str(event.id), "--reason", "why")
    assert (run.returncode, len(run.stderr.splitlines())) == (1, 1)
    assert "lock" in run.stderr
    assert len(_balances()) == 1


# ---- old history


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "old").mkdir()
    entry = {
        "date": "2026-01-02", "timestamp": "2026-01-02T10:00:00", "balance": 1, "total_invested": 0,
        "total_profit_loss": 0, "total_value": 1, "open_positions": 0, "trade_count": 0,
    }  # fmt: skip
    entries = [entry, entry | {"timestamp": "2026-01-02T11:00:00"}]
    (tmp_path / "old" / "portfolio_history.json").write_text(json.dumps(entries))
    return tmp_path / "old"


def test_import_leaves_a_withdrawn_row_out_and_verify_names_it(database_url: str, old: Path, tmp_path: Path) -> None:
    """It is not missing, the audit accounts for it, and an export does not have it."""
    assert _run("import", str(old), "--timezone", "UTC").returncode == 0
    ((event_id,),) = _execute("SELECT event_id FROM portfolio_history WHERE sequence = 0")
    _withdraw(event_id)
    again = _run("import", str(old), "--timezone", "UTC", "--report", str(tmp_path / "report"))
    assert again.returncode == 1
    assert "withdrawn: " in (tmp_path / "report").read_text()
    assert (_execute("SELECT sequence FROM portfolio_history"), list(rejections())) == ([(1,)], [])
    (one,) = audit()
    assert (one.stored, one.withdrawn, one.rejected, one.missing) == (1, 1, 0, [])

    def verified() -> list[Any]:
        run = _run("verify", str(old), "--timezone", "UTC", "--json")
        assert (run.returncode, run.stderr) == (1, "")
        return [(found["what"], found["index"], found["reason"]) for found in json.loads(run.stdout)["differences"]]

    ((what, index, reason),) = verified()
    assert (what, index) == ("withdrawn", 0)
    assert f"by alice at {datetime.now(UTC):%Y-%m-%d}" in reason
    insert_portfolio_history_snapshot(
        {"timestamp": datetime(2026, 1, 2, 10, tzinfo=UTC), "balance": 2, "total_invested": 0, "total_profit_loss": 0,
         "total_value": 1, "open_positions": 0, "trade_count": 0}
    )  # fmt: skip
    ((what, index, reason),) = verified()
    assert (what, index) == ("withdrawn", 0)
    assert _run("export", str(tmp_path / "new"), "--timezone", "UTC").returncode == 0
    exported = json.loads((tmp_path / "new" / "portfolio_history.json").read_text())
    assert [entry["balance"] for entry in exported] == [2, 1]


def test_an_import_with_another_zone_after_a_withdrawal_is_no_copied_outbox(database_url: str, old: Path) -> None:
    """Rows of a wrong zone are withdrawn and imported again: a number then has a withdrawn row and a row."""
    assert _run("import", str(old), "--timezone", "Asia/Tokyo").returncode == 0
    for (event_id,) in _execute("SELECT event_id FROM portfolio_history"):
        _withdraw(event_id)
    assert _run("import", str(old), "--timezone", "UTC").returncode == 0
    (one,) = audit()
    assert (one.stored, one.withdrawn, one.missing, one.shared, one.copied) == (2, 2, [], [], False)


def test_audit_since_a_time_after_the_withdrawal_begins_behind_it(database_url: str) -> None:
    """The withdrawal has the time of the insert, so the audit begins at the same number as before."""
    insert_event(_event(a_snapshot(), 100))
    _execute("UPDATE portfolio_history SET created_at = now() - interval '2 days'")
    insert_event(_event(a_snapshot(after=timedelta(hours=1)), 101))
    _withdraw(a_snapshot().event_id)
    (one,) = audit(since=datetime.now(UTC) - timedelta(days=1))
    assert (one.proven_from, one.stored, one.withdrawn, one.missing) == (101, 1, 0, [])
    (one,) = audit(since=datetime.now(UTC) - timedelta(days=3))
    assert (one.stored, one.withdrawn, one.missing) == (1, 1, [(1, 99)])

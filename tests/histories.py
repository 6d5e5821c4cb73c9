"""Insert rows for tests of the read side directly into the tables."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import text

from consumers.db.engine import engine, get_db
from consumers.db.inserts import insert_event
from producers.events import event_of
from tests.factories import a_snapshot, an_archive

START = datetime(2026, 6, 1, 12, tzinfo=UTC)

_MANY = text("""
    INSERT INTO portfolio_history (event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance,
        total_invested, total_profit_loss, total_value, open_positions, trade_count)
    SELECT gen_random_uuid(), 'many/x', number, :portfolio, CAST(at AT TIME ZONE 'UTC' AS date), at,
        9640 + wave, 360, wave, 10000 + wave, 3, number
    FROM (SELECT number, :start + number * CAST(:step AS interval) AS at,
            CAST(round(CAST(2000 * sin(number / 9000.0) + 300 * sin(number / 311.0) AS numeric), 2) AS numeric) AS wave
        FROM generate_series(0, :count - 1) AS number) AS waves
""")


def store_values(
    values: Sequence[Any], *, step: timedelta = timedelta(days=1), start: datetime = START, portfolio: int | None = 1
) -> None:
    """Store one snapshot for each value, `step` apart. None leaves out a step."""
    for number, value in enumerate(values):
        if value is None:
            continue
        at = start + number * step
        insert_event(
            event_of(
                a_snapshot(
                    timestamp=at, snapshot_date=at.date(), total_value=value, portfolio_id=portfolio,
                    balance=Decimal(str(value)) - 100,
                ),
                source="direct",
                sequence=None,
            )
        )  # fmt: skip


def store_amounts(*amounts: tuple[str, str, str, str], portfolio: int = 1) -> None:
    """Store a snapshot a day with these balances, invested sums, profits or losses, and values."""
    for number, (balance, invested, profit_loss, value) in enumerate(amounts):
        at = START + timedelta(days=number)
        snapshot = a_snapshot(
            timestamp=at, snapshot_date=at.date(), portfolio_id=portfolio, balance=balance, total_invested=invested,
            total_profit_loss=profit_loss, total_value=value,
        )  # fmt: skip
        insert_event(event_of(snapshot, source="direct", sequence=None))


def store_archive(signals: list[dict[str, Any]], *, at: datetime = START, portfolio: int | None = 1) -> int:
    return insert_event(
        event_of(an_archive(archived_at=at, signals=signals, portfolio_id=portfolio), source="direct", sequence=None)
    )


def store_many(count: int, *, step: str = "5 minutes", portfolio: int = 1, start: datetime = START) -> None:
    """Store `count` snapshots whose values are the sum of two sine waves."""
    with get_db() as db:
        db.execute(_MANY, {"count": count, "step": step, "portfolio": portfolio, "start": start})
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE portfolio_history")


def store_rejection(job_id: str, reason: str) -> None:
    with get_db() as db:
        db.execute(
            text(
                "INSERT INTO event_outcomes (job_id, outcome, reason, event) VALUES (:job, 'rejected', :reason, '{}')"
            ),
            {"job": job_id, "reason": reason},
        )

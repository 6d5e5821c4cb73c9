"""How long the audit takes on a large history."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from sqlalchemy import text

from consumers.audit import audit
from consumers.connection import engine
from consumers.stack import embedded_stack

_FILL = text("""
    INSERT INTO portfolio_history (event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance,
        total_invested, total_profit_loss, total_value, open_positions, trade_count)
    SELECT gen_random_uuid(), 'bot-' || number % 4 || '/0123456789abcdef0123456789abcdef', number / 4 + 1, number % 4,
        date '2020-01-01' + number / 10000,
        timestamptz '2020-01-01' + number * interval '8 seconds', number, 1, 2, 3, 4, 5
    FROM generate_series(0, :rows - 1) AS number
    WHERE number <> :lost
""")


def measure_audit(rows: int) -> None:
    """Print the seconds, and that the one missing number was found."""
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder, embedded_stack(Path(folder)):
        with engine().begin() as db:
            db.execute(_FILL, {"rows": rows, "lost": rows // 2})
        with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            db.exec_driver_sql("VACUUM ANALYZE portfolio_history")
        started = time.monotonic()
        audits = audit()
        seconds = time.monotonic() - started
        missing = [(one.source.split("/")[0], one.missing) for one in audits if one.missing]
    print(f"audit of {rows:,} rows in {len(audits)} sources: {seconds:.1f} s, missing: {missing}")

"""Upgrade from an earlier commit with undelivered events: `python -m tests.faults upgrade --from COMMIT`.

There are two virtual environments, with the tree of that commit and with this tree. The old one records events and
stores some of them. Then the upgrade proceeds in the documented order: `init-db`, workers, controllers. At the end
every accepted event must be one row or one recorded rejection, every entry settled, and the audit complete.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import venv
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.embedded.stack import embedded_stack

_ROOT = Path(__file__).parents[2]
_SECONDS = 300

# Entries of one run: 10 new events, a duplicate of the first, a conflict with the second. Runs with both trees.
_CONTROLLER = """
import sys
from datetime import UTC, datetime, timedelta
from producers.history_producer import HistoryProducer
from producers.trading_controller import create_daily_portfolio_snapshot
first, many, wait = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with HistoryProducer() as producer:
    receipts = []
    for number in range(first, first + many):
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=number)
        receipts.append(create_daily_portfolio_snapshot({"balance": number}, 1, timestamp=at, producer=producer))
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=first)
    create_daily_portfolio_snapshot({"balance": first}, 1, timestamp=at, producer=producer)
    at += timedelta(hours=1)
    create_daily_portfolio_snapshot({"balance": -1}, 1, timestamp=at, producer=producer)
    producer.flush(10)
    if wait:
        print([receipt.wait(wait) for receipt in receipts])
"""
_NO_REDIS = "redis://127.0.0.1:1/0"


@dataclass
class Upgrade:
    """Results of an upgrade: faults, which should be none, and notes."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require(self, condition: object, fault: str) -> None:
        if not condition:
            self.faults.append(fault)


def run_upgrade(home: Path, commit: str) -> Upgrade:
    """Upgrade in the empty folder `home` and check the results."""
    found = Upgrade()
    old_tree = home / "old-tree"
    old_tree.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=_ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "x"], cwd=old_tree, input=archive.stdout, check=True)
    old, new = _environment(home / "old", old_tree), _environment(home / "new", _ROOT)
    outbox = home / "outbox.db"
    os.environ["HISTORY_OUTBOX"] = str(outbox)
    (home / "servers").mkdir()
    with embedded_stack(home / "servers"):
        with get_db() as db:  # the embedded stack has created the tables of this tree: start without them
            db.execute(text("DROP SCHEMA public CASCADE"))
            db.execute(text("CREATE SCHEMA public"))
        _run(old, "-m", "consumers.cli", "init-db")
        worker = _worker(old)
        _run(old, "-c", _CONTROLLER, "0", "10", "30")
        # An old worker must also work with the new tables.
        _run(new, "-m", "consumers.cli", "init-db")
        _run(old, "-c", _CONTROLLER, "100", "10", "30")
        worker.terminate()
        worker.wait(30)
        _run(old, "-c", _CONTROLLER, "200", "10", "0")  # waits in the queue
        _run(old, "-c", _CONTROLLER, "300", "10", "0", REDIS_URL=_NO_REDIS)  # waits in the outbox
        waiting = _jobs_of(outbox)
        worker = _worker(new)
        _run(old, "-c", _CONTROLLER, "400", "10", "0")
        _run(new, "-c", _CONTROLLER, "500", "10", "60")
        found.require(
            _run(new, "-m", "consumers.cli", "outbox", "flush", "--timeout", "60") == 0, "`outbox flush` failed"
        )
        worker.terminate()
        worker.wait(30)
        _judge(found, outbox, waiting)
        found.require(_run(new, "-m", "consumers.cli", "audit") == 0, "`audit` failed")
    return found


def _judge(found: Upgrade, outbox: Path, waiting: set[tuple[str, int]]) -> None:
    with sqlite3.connect(outbox) as db:
        states = dict(db.execute("SELECT state, count(*) FROM entries GROUP BY state"))
        without_nonce = set(db.execute("SELECT source_id, sequence FROM entries WHERE nonce = ''"))
    runs = 6
    found.notes.append(f"entries by state: {states}")
    found.require(states == {"stored": 11 * runs, "rejected": runs}, f"entries by state are {states}")
    found.require(waiting <= without_nonce, "entries of the old tree have new job ids")
    with get_db() as db:
        rows = db.execute(text("SELECT count(*), count(DISTINCT event_id) FROM portfolio_history")).one()
        outcomes = {row.outcome: row.n for row in db.execute(text(_OUTCOMES))}
    found.notes.append(f"rows: {rows[0]}, outcomes: {outcomes}")
    found.require(tuple(rows) == (10 * runs, 10 * runs), f"{rows[0]} rows")
    found.require(outcomes == {"duplicate": runs, "rejected": runs}, f"outcomes are {outcomes}")


_OUTCOMES = "SELECT outcome, count(*) AS n FROM event_outcomes GROUP BY outcome"


def _jobs_of(outbox: Path) -> set[tuple[str, int]]:
    with sqlite3.connect(outbox) as db:
        return set(db.execute("SELECT source_id, sequence FROM entries WHERE state IN ('pending', 'sent')"))


def _environment(folder: Path, tree: Path) -> Path:
    """Create a virtual environment, install the tree's package (not editable) and return its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"{tree}[worker]"], check=True, timeout=600)
    return python


def _run(python: Path, *arguments: str, **settings: str) -> int:
    """Run Python in a folder outside any tree, so that it imports the installed package; return the exit status."""
    environment = {**os.environ, **settings}
    return subprocess.run(
        [python, *arguments], cwd=python.parent, env=environment, timeout=_SECONDS, check=False
    ).returncode


def _worker(python: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([python, "-m", "consumers.cli", "worker"], cwd=python.parent)

"""An upgrade from an earlier commit while events are under way: `python -m tests.faults upgrade --from COMMIT`.

Two virtual environments are made, one with the tree of that commit. The old one records events and stores some of them;
then the order of an upgrade is followed: `init-db`, workers, controllers. At the end every event that was accepted is
one row or one recorded rejection, every entry is settled, and `audit` and `failed` agree.
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

# Events by number: 0-9 new, 10 the same as 0, 11 in conflict with 1. It works with the packages of both trees.
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
_EACH = 12  # entries of one run: 10 new facts, a duplicate, a conflict
_NO_REDIS = "redis://127.0.0.1:1/0"


@dataclass
class Upgrade:
    """What was found wrong, in words; nothing is what this is for."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require(self, condition: object, fault: str) -> None:
        if not condition:
            self.faults.append(fault)


def run_upgrade(home: Path, commit: str) -> Upgrade:
    """In the empty folder `home`."""
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
        with get_db() as db:  # the tables of the old tree, not those that the embedded servers come with
            db.execute(text("DROP SCHEMA public CASCADE"))
            db.execute(text("CREATE SCHEMA public"))
        _run(old, "-m", "consumers.cli", "init-db")
        worker = _worker(old)
        _run(old, "-c", _CONTROLLER, "0", "10", "30")
        # Before the new tables, a worker of the old tree meets what it writes in its own words.
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
        found.require(_run(new, "-m", "consumers.cli", "outbox", "flush", "--timeout", "60") == 0, "flush failed")
        worker.terminate()
        worker.wait(30)
        _judge(found, outbox, waiting)
        found.require(_run(new, "-m", "consumers.cli", "audit") == 0, "audit misses something")
    return found


def _judge(found: Upgrade, outbox: Path, waiting: set[tuple[str, int]]) -> None:
    with sqlite3.connect(outbox) as db:
        states = dict(db.execute("SELECT state, count(*) FROM entries GROUP BY state"))
        without_nonce = set(db.execute("SELECT source_id, sequence FROM entries WHERE nonce = ''"))
    runs = 6
    found.notes.append(f"entries by state: {states}")
    found.require(states == {"stored": 11 * runs, "rejected": runs}, f"entries by state are {states}")
    found.require(waiting <= without_nonce, "entries of the old tree have got other job ids")
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
    """The interpreter of a new virtual environment with the tree's own package, not editable."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"{tree}[worker]"], check=True, timeout=600)
    return python


def _run(python: Path, *arguments: str, **settings: str) -> int:
    """In a folder without a project, so that the installed packages are found; its exit status."""
    environment = {**os.environ, **settings}
    return subprocess.run(
        [python, *arguments], cwd=python.parent, env=environment, timeout=_SECONDS, check=False
    ).returncode


def _worker(python: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([python, "-m", "consumers.cli", "worker"], cwd=python.parent)

"""Program that records when rows become visible: `python -m tests.benchmarks.observer COUNT`.

It is a separate process so that it does not slow the producer down. Its times are those of the system's monotonic
clock, which all processes share. When it has seen COUNT rows, or when its standard input ends, it prints a JSON list of
[sequence, seconds] and exits.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import text

from consumers.db.engine import engine
from tests.benchmarks.checks import require

# Pause between two queries, which is the resolution of the times. A query must be cheap, or it slows the worker down:
# the statement is prepared, and runs directly on the driver.
_PAUSE_SECONDS = 0.002
# Worker threads commit in any order: a row with a lower id may appear after a higher one, and some ids are never used.
_PREPARE = """
    PREPARE new (bigint, bigint[]) AS SELECT id, sequence FROM portfolio_history WHERE id > $1 AND id <> ALL ($2)
"""
_STORED = text("SELECT count(*) FROM portfolio_history WHERE id <= :highest")


@contextmanager
def observer(count: int) -> Iterator[subprocess.Popen[str]]:
    """Start the process and yield it once it is ready; `seen_by` ends it."""
    command = [sys.executable, "-m", "tests.benchmarks.observer", str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def seen_by(process: subprocess.Popen[str], seconds: float) -> dict[int, float]:
    """Wait at most `seconds` for the process to see all rows; return sequence -> monotonic seconds."""
    assert process.stdout is not None
    assert process.stdin is not None
    select.select([process.stdout], [], [], seconds)
    process.stdin.close()
    answer = process.stdout.readline()
    require(bool(answer), "the observer failed")
    return dict(json.loads(answer))


def _watch(count: int) -> None:
    seen: list[tuple[int, float]] = []
    last, above, highest = 0, set[int](), 0
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        cursor = db.connection.cursor()
        cursor.execute(_PREPARE)
        print("ready", flush=True)
        while len(seen) < count and not select.select([sys.stdin], [], [], _PAUSE_SECONDS)[0]:
            cursor.execute("EXECUTE new (%s, %s)", (last, list(above)))
            rows = cursor.fetchall()
            now = time.monotonic()
            seen += [(sequence, now) for _, sequence in rows]
            above |= {row_id for row_id, _ in rows}
            highest = max([highest, *above])
            while last + 1 in above:
                last += 1
                above.remove(last)
        stored = db.execute(_STORED, {"highest": highest}).scalar_one()
    require(stored == len(seen), f"{len(seen)} rows were seen, {stored} were stored")
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]))

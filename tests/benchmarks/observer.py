"""Notes when rows become visible: `python -m tests.benchmarks.observer COUNT`.

A process of its own, so that it takes no time from the producer. Its clock is the system's monotonic one, which all
processes share. It ends when it has seen COUNT rows or its input ends, with one JSON list of [sequence, seconds].
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

# It asks again after so long, which is the resolution of what it notes. Asking must be cheap, or what it watches gets
# less of the machine: a statement that is planned once, and no layer above the driver.
_PAUSE_SECONDS = 0.002
# Lanes commit in any order: rows come in between those that were seen. Numbers that are never used stay missing.
_PREPARE = """
    PREPARE new (bigint, bigint[]) AS SELECT id, sequence FROM portfolio_history WHERE id > $1 AND id <> ALL ($2)
"""
_STORED = text("SELECT count(*) FROM portfolio_history WHERE id <= :highest")


@contextmanager
def observer(count: int) -> Iterator[subprocess.Popen[str]]:
    """The process, ready; `seen_by` ends it."""
    command = [sys.executable, "-m", "tests.benchmarks.observer", str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def seen_by(process: subprocess.Popen[str], seconds: float) -> dict[int, float]:
    """Sequence -> monotonic seconds of what it has seen, at the latest `seconds` from now."""
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
        asking = db.connection.cursor()
        asking.execute(_PREPARE)
        print("ready", flush=True)
        while len(seen) < count and not select.select([sys.stdin], [], [], _PAUSE_SECONDS)[0]:
            asking.execute("EXECUTE new (%s, %s)", (last, list(above)))
            rows = asking.fetchall()
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

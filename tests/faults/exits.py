"""Exits of controllers that record two events, on two busy cores: with a worker, and with Redis unreachable."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.embedded.stack import embedded_stack
from tests.faults.proxy import Mode
from tests.relaying import TWO_EVENTS, Ended, a_proxy, a_relay, a_worker, run_script, states, unsettled
from tests.rq_programs import until

_EVENTS = 2  # of a controller
_AFTER_SECONDS = 3.0
_MOST_EXIT_SECONDS = 2.5
_LONGEST_RUN_SECONDS = 8.0  # time per run after which the busy loops end, should this program be killed
_BUSY = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"


def print_exits(home: Path, runs: int) -> int:
    """Run both kinds `runs` times and print the entries left and the exit times.

    Returns:
        1 if a promise was broken, else 0.
    """
    with ExitStack() as running:
        running.enter_context(embedded_stack(home / "servers"))
        redis = running.enter_context(Redis.from_url(os.environ["REDIS_URL"]))
        running.enter_context(a_worker(redis, home / "worker.log"))
        running.enter_context(_busy_cores(2, 2 * runs * _LONGEST_RUN_SECONDS))
        breaches = [*_with_a_worker(home, runs), *_with_redis_away(home, runs)]
    for breach in breaches:
        print(f"  {breach}")
    print(f"{len(breaches)} breaches of the promise")
    return 1 if breaches else 0


@contextmanager
def _busy_cores(cores: int, seconds: float) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY, str(seconds)]) for _ in range(cores)]
    try:
        yield
        assert all(loop.poll() is None for loop in loops), "the cores were not busy until the end"
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _with_a_worker(home: Path, runs: int) -> Iterator[str]:
    """Each run has its own outbox: no run settles entries of an earlier one."""
    outboxes = [home / f"outbox-{number}.db" for number in range(runs)]
    ended = [_run(home, outbox) for outbox in outboxes]
    time.sleep(_AFTER_SECONDS)
    left = [(outbox, states(outbox)) for outbox in outboxes if unsettled(outbox)]
    _print("with a worker", ended, f"{sum(map(unsettled, outboxes))} entries unsettled after {_AFTER_SECONDS:.0f} s")
    for outbox, found in left:
        yield f"{outbox.name}: {found}"
    stored = sum(states(outbox).get("stored", 0) for outbox in outboxes)
    if stored + sum(map(unsettled, outboxes)) != _EVENTS * runs:
        yield f"{stored} of {_EVENTS * runs} entries are stored"
    yield from _failed(ended)


def _with_redis_away(home: Path, runs: int) -> Iterator[str]:
    """All runs share an outbox, as with cron. Redis alternately refuses connections, and accepts but never answers."""
    outbox = home / "outbox-away.db"
    before = _rows()
    with a_proxy(os.environ["REDIS_URL"], home) as (proxy, url):
        ended = []
        for number in range(runs):
            modes: Sequence[Mode] = ("refuse", "swallow")
            proxy.set_mode(modes[number % 2])
            ended.append(_run(home, outbox, REDIS_URL=url))
        kept = states(outbox)
        proxy.set_mode("pass")
        began = time.monotonic()
        with a_relay(home / "relay.log", "--outbox", outbox, REDIS_URL=url):
            until(lambda: not unsettled(outbox), 120)
        took = time.monotonic() - began
    _print("Redis unreachable", ended, f"kept {kept}; a relay delivered them in {took:.1f} s")
    if kept != {"pending": _EVENTS * runs}:
        yield f"kept {kept} of {_EVENTS * runs} events"
    if states(outbox) != {"stored": _EVENTS * runs} or _rows() - before != _EVENTS * runs:
        yield f"{states(outbox)}, {_rows() - before} new rows of {_EVENTS * runs} events"
    yield from _failed(ended)
    for number, one in enumerate(ended):
        if one.seconds > _MOST_EXIT_SECONDS:
            yield f"run {number}: the exit took {one.seconds:.2f} s"


def _run(home: Path, outbox: Path, **environment: str) -> Ended:
    return run_script(TWO_EVENTS, home, HISTORY_OUTBOX=str(outbox), **environment)


def _failed(ended: Sequence[Ended]) -> Iterator[str]:
    for number, one in enumerate(ended):
        if one.returncode:
            yield f"run {number} ended with status {one.returncode}: {one.errors.strip()[-200:]}"


def _rows() -> int:
    with get_db() as db:
        return int(db.scalar(text("SELECT count(*) FROM portfolio_history")) or 0)


def _print(kind: str, ended: Sequence[Ended], found: str) -> None:
    seconds = sorted(one.seconds for one in ended)
    p50, p99 = (seconds[min(int(share * len(seconds)), len(seconds) - 1)] for share in (0.5, 0.99))
    print(f"{kind}: {len(ended)} runs, {found}", flush=True)
    print(f"    exit: p50 {p50:.2f} s, p99 {p99:.2f} s, at most {seconds[-1]:.2f} s", flush=True)

"""Kinds of faults of the benchmark `quality`: a run causes one several times, in the same way for each contender."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from redis import Redis
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from consumers.db.engine import engine
from consumers.embedded import postgres, servers, valkey
from consumers.embedded.server_process import Server
from tests.benchmarks.checks import require
from tests.faults.proxy import Proxy
from tests.faults.supervisor import Supervisor

WORKER, PRODUCER = "worker 0", "producer 0"
_HELD_SECONDS = 0.5
_MOST_HELD_SECONDS = 3.0  # the lock timeout of HistoryWorker is 5 s
_WAITING = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
_CUTS = 10
_CUT_SECONDS = 0.2
_STOPPED_SECONDS = 35.0  # longer than HistoryWorker's lease (20 s) and PgQueuer's heartbeat timeout (30 s)
_UNREACHABLE_SECONDS = 10.0
_KILLS_APART_SECONDS = 30.0  # longer than HistoryWorker needs until it requeues the jobs, so that none is hit twice


@dataclass(frozen=True)
class Pipeline:
    """Servers, proxies before them, and programs of one run: a fault hits one of them."""

    home: Path
    programs: Supervisor
    redis_proxy: Proxy
    database_proxy: Proxy


Step = Callable[[Pipeline], None]


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault, which lasts from the call of `begin` for `seconds`, and then until `end` returns.

    If `held`, it begins while the inserts of all workers wait for a lock, which is released after `begin`: so it meets
    each worker in the middle of its work. If they do not wait within 3 s, it begins without them.
    """

    begin: Step | None = None
    end: Step | None = None
    seconds: float = 0.0
    apart_seconds: float = 12.0  # from `seconds` after its begin to the begin of the next one, or the end of the load
    held: bool = True
    workers: int = 1
    calls: int = 1  # of the producer, for each event
    of_redis: bool = False
    proxied: Literal["REDIS_URL", "DATABASE_URL"] | None = None  # the server that programs reach through the proxy


@contextmanager
def _held_inserts(workers: int) -> Iterator[None]:
    """Lock the history until this number of inserts waits for it, at most 3 s, and for half a second more."""
    until = time.monotonic() + _MOST_HELD_SECONDS
    with suppress(DBAPIError), engine().connect() as db:  # the fault may end the connection
        db.execute(text("LOCK TABLE portfolio_history IN EXCLUSIVE MODE"))
        while db.execute(_WAITING).scalar_one() < workers and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(_HELD_SECONDS)
        yield
        db.rollback()


def begin(kind: FaultKind, pipeline: Pipeline) -> None:
    """Begin a fault of this kind."""
    assert kind.begin is not None
    if not kind.held:
        kind.begin(pipeline)
        return
    with _held_inserts(kind.workers):
        kind.begin(pipeline)


def _send(program: str, number: signal.Signals) -> Step:
    return lambda pipeline: pipeline.programs.send(program, number)


def _kill_server(server_in: Callable[[Path], Server], number: signal.Signals) -> Step:
    def kill(pipeline: Pipeline) -> None:
        process = server_in(pipeline.home).process()
        require(process is not None, "a server does not run")
        assert process is not None
        process.send_signal(number)
        with suppress(psutil.TimeoutExpired):
            process.wait(10)

    return kill


def _start_servers(pipeline: Pipeline) -> None:
    """Start the server that does not run; both keep running, because the benchmark uses them too."""
    with servers(pipeline.home):
        pass


def _cut_often(pipeline: Pipeline) -> None:
    """Delay each piece of data by 50 ms and cut all connections ten times, so that some cuts fall into a commit."""
    pipeline.database_proxy.set_mode("delay")
    for _ in range(_CUTS):
        time.sleep(_CUT_SECONDS)
        pipeline.database_proxy.cut()
    pipeline.database_proxy.set_mode("pass")


def _flush(pipeline: Pipeline) -> None:
    with Redis.from_url(os.environ["REDIS_URL"]) as redis:
        redis.flushall()


def _refuse(pipeline: Pipeline) -> None:
    pipeline.redis_proxy.set_mode("refuse")
    pipeline.redis_proxy.cut()


def _pass(pipeline: Pipeline) -> None:
    pipeline.redis_proxy.set_mode("pass")


KINDS: dict[str, FaultKind] = {
    "none": FaultKind(),
    "worker: `kill -9`": FaultKind(_send(WORKER, signal.SIGKILL), apart_seconds=_KILLS_APART_SECONDS),
    "worker: SIGSTOP for 35 s, a second worker runs": FaultKind(
        _send(WORKER, signal.SIGSTOP), _send(WORKER, signal.SIGCONT), _STOPPED_SECONDS, workers=2
    ),
    "PostgreSQL: immediate stop, start": FaultKind(_kill_server(postgres.server, signal.SIGQUIT), _start_servers),
    "PostgreSQL: 10 cuts of all connections in 2 s": FaultKind(_cut_often, held=False, proxied="DATABASE_URL"),
    "Redis: `kill -9`, start (AOF every second)": FaultKind(
        _kill_server(valkey.server, signal.SIGKILL), _start_servers, of_redis=True
    ),
    "Redis: FLUSHALL": FaultKind(_flush, of_redis=True),
    "Redis: unreachable for 10 s": FaultKind(_refuse, _pass, _UNREACHABLE_SECONDS, of_redis=True, proxied="REDIS_URL"),
    "producer: `kill -9`": FaultKind(_send(PRODUCER, signal.SIGKILL)),
    "caller: each event twice": FaultKind(calls=2),
}

"""Producers and workers as processes, faults at random under a seed, and the verdict at the end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psutil
from redis import Redis, RedisError
from rq.utils import as_text
from sqlalchemy import text

from consumers.connection import engine
from consumers.embedded import servers
from consumers.stack import embedded_stack
from producers.history_producer import HistoryProducer
from producers.redis_keys import held_key
from tests.faults.programs import look_often
from tests.faults.proxy import Proxy
from tests.faults.verdict import Verdict, verdict

ROOT = Path(__file__).parents[2]
_PRODUCERS = 3
_WORKERS = 2
_DRAIN_SECONDS = 400.0


@dataclass
class Storm:
    """One run's servers, processes and tallies."""

    home: Path
    dice: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    told: list[tuple[str, int, str]] = field(default_factory=list)
    worst_queue_entries: int = 0
    _processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    _readers: list[threading.Thread] = field(default_factory=list)
    _generation: int = 0

    def outboxes(self) -> list[Path]:
        return sorted(self.home.glob("outbox-*.db"))

    @property
    def proxied_redis_url(self) -> str:
        return f"unix://{quote(str(self.home / 'proxy-redis.sock'))}?db=0"

    def start_producer(self, number: int) -> None:
        self._generation += 1
        seed = number + 1000 * self._generation
        arguments = ["producer", str(self.home / f"outbox-{number}.db"), str(seed), "1000000", "0.02"]
        process = self._start(f"producer {number}", "tests.faults.programs", *arguments)
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        self._readers.append(reader)

    def start_worker(self, number: int) -> None:
        # One of them is RQ's own, beside ours on the same queue.
        if number == _WORKERS:
            command = ["worker", "--url", self.proxied_redis_url, "--serializer", "json"]
            self._start(f"worker {number}", "rq.cli", *command, "--worker-class", "rq.SimpleWorker", "history")
        else:
            self._start(f"worker {number}", "tests.faults.programs", "worker")

    def _start(self, name: str, module: str, *arguments: str) -> subprocess.Popen[str]:
        log = open(self.home / f"{name.replace(' ', '-')}.log", "a")  # noqa: SIM115  # closed below, the child has it
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdout=subprocess.PIPE if name.startswith("producer") else log,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, "REDIS_URL": self.proxied_redis_url, "DATABASE_URL": self._proxied_database_url()},
            )
        self._processes[name] = process
        return process

    def _proxied_database_url(self) -> str:
        return f"postgresql://postgres@/trading_history?host={quote(str(self.home / 'proxy'), safe='')}"

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):
                source, sequence, event_id = line.split()
                self.told.append((source, int(sequence), event_id))

    def kill(self, kind: str) -> None:
        name = self.dice.choice([name for name in self._processes if name.startswith(kind)])
        self._reap(name, signal.SIGKILL)
        (self.start_producer if kind == "producer" else self.start_worker)(int(name.split()[1]))

    def restart_what_ended(self) -> None:
        """As a supervisor does: RQ's own worker ends when it loses its connection."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                self._reap(name, signal.SIGKILL)
                (self.start_producer if name.startswith("producer") else self.start_worker)(int(name.split()[1]))

    def _reap(self, name: str, number: signal.Signals) -> None:
        process = self._processes.pop(name)
        process.send_signal(number)
        process.wait(30)

    def stop(self, kind: str) -> None:
        for name in [name for name in self._processes if name.startswith(kind)]:
            self._processes[name].send_signal(signal.SIGCONT)
            self._reap(name, signal.SIGKILL)
        for reader in self._readers if kind == "producer" else ():
            reader.join(10)

    def pid(self, server: str) -> int:
        file = self.home / ("valkey.pid" if server == "redis" else "postgres/postmaster.pid")
        return int(file.read_text().split("\n", 1)[0])

    def signal_server(self, server: str, number: signal.Signals) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(self.pid(server), number)

    def bring_back(self) -> None:
        """Start whatever of the two servers is not running; the outer user of the pair keeps it."""
        with servers(self.home):
            pass

    def pause(self, server: str, seconds: float) -> None:
        """Freeze it with every process that it has now: connected, but without an answer."""
        frozen: list[psutil.Process] = []
        with contextlib.suppress(FileNotFoundError, psutil.Error, ValueError):
            main = psutil.Process(self.pid(server))
            frozen = [main, *main.children()]
        _send(frozen, signal.SIGSTOP)
        time.sleep(seconds)
        _send(frozen, signal.SIGCONT)

    def sample_queue(self, redis: Redis) -> None:
        """How often one delivery stands in the queue and the held lists together, at worst."""
        with contextlib.suppress(RedisError):
            ids = redis.lrange("rq:queue:history", 0, -1)
            for worker in redis.hkeys("history:holders:history"):
                ids += redis.lrange(held_key("history", as_text(worker)), 0, -1)
            if ids:
                self.worst_queue_entries = max(self.worst_queue_entries, Counter(ids).most_common(1)[0][1])


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _terminate_backends() -> None:
    statement = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
    with contextlib.suppress(Exception), engine().connect() as db:
        db.execute(text(f"{statement} AND pid <> pg_backend_pid()"))


def _rename_table_for(seconds: float) -> None:
    with contextlib.suppress(Exception):
        with engine().begin() as db:
            db.execute(text("SET LOCAL lock_timeout = '2s'"))
            db.execute(text("ALTER TABLE portfolio_history RENAME TO portfolio_history_away"))
        time.sleep(seconds)
        for _ in range(50):
            with contextlib.suppress(Exception), engine().begin() as db:
                db.execute(text("ALTER TABLE portfolio_history_away RENAME TO portfolio_history"))
                return
            time.sleep(0.2)


def _proxied(proxy: Proxy, mode: str, seconds: float) -> None:
    proxy.set_mode(mode)  # type: ignore[arg-type]  # from the literal names below
    time.sleep(seconds)
    proxy.set_mode("pass")


def _faults(storm: Storm, redis: Redis, redis_proxy: Proxy, database_proxy: Proxy) -> dict[str, Callable[[], None]]:
    dice = storm.dice

    def kill_server(server: str, number: signal.Signals) -> None:
        storm.signal_server(server, number)
        time.sleep(dice.random() * 2)
        storm.bring_back()

    def without_aof() -> None:
        with contextlib.suppress(RedisError):  # it may be loading, or away
            redis.config_set("appendonly", "no")
        time.sleep(dice.random())
        kill_server("redis", signal.SIGKILL)

    faults: dict[str, Callable[[], None]] = {
        "worker killed": lambda: storm.kill("worker"),
        "producer killed": lambda: storm.kill("producer"),
        "redis killed": lambda: kill_server("redis", signal.SIGKILL),
        "redis killed without AOF": without_aof,
        "redis restarted": lambda: kill_server("redis", signal.SIGTERM),
        "redis paused": lambda: storm.pause("redis", dice.random() * 3),
        "redis flushed": lambda: _flush(redis),
        "postgres killed": lambda: kill_server("postgres", signal.SIGKILL),
        "postgres stopped at once": lambda: kill_server("postgres", signal.SIGQUIT),
        "postgres restarted": lambda: kill_server("postgres", signal.SIGINT),
        "postgres paused": lambda: storm.pause("postgres", dice.random() * 3),
        "postgres backends terminated": _terminate_backends,
        "table away": lambda: _rename_table_for(dice.random() * 2),
    }
    for name, proxy in (("redis", redis_proxy), ("postgres", database_proxy)):
        faults |= {
            f"{name} connections cut": proxy.cut,
            f"{name} connections half-closed": proxy.half_close,
            f"{name} refused": lambda proxy=proxy: _proxied(proxy, "refuse", dice.random() * 3),  # type: ignore[misc]  # a default binds the loop's proxy
            f"{name} swallowed": lambda proxy=proxy: _proxied(proxy, "swallow", dice.random() * 3),  # type: ignore[misc]  # likewise
            f"{name} slow": lambda proxy=proxy: _proxied(proxy, "delay", dice.random() * 3),  # type: ignore[misc]  # likewise
        }
    return faults


def _flush(redis: Redis) -> None:
    with contextlib.suppress(RedisError):
        redis.flushall()


@contextmanager
def _proxies(home: Path) -> Iterator[tuple[Proxy, Proxy]]:
    (home / "proxy").mkdir()
    redis_proxy = Proxy(home / "proxy-redis.sock", home / "valkey.sock")
    database_proxy = Proxy(home / "proxy" / ".s.PGSQL.5432", home / "postgres" / ".s.PGSQL.5432")
    with redis_proxy.running(), database_proxy.running():
        yield redis_proxy, database_proxy


def run_storm(home: Path, *, seconds: float, seed: int) -> tuple[Storm, Verdict]:
    """Run for `seconds` in the empty folder `home`; then end the faults, let everything drain, and judge."""
    look_often()
    storm = Storm(home, random.Random(seed))
    with ExitStack() as stack:
        stack.enter_context(embedded_stack(home))
        redis_proxy, database_proxy = stack.enter_context(_proxies(home))
        redis = Redis.from_url(os.environ["REDIS_URL"], socket_timeout=2)
        faults = _faults(storm, redis, redis_proxy, database_proxy)
        for number in range(_PRODUCERS):
            storm.start_producer(number)
        for number in range(_WORKERS + 1):
            storm.start_worker(number)
        stack.callback(storm.stop, "worker")
        stack.callback(storm.stop, "producer")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(storm.dice.random() * 2)
            name = storm.dice.choice(list(faults))
            faults[name]()
            storm.faults[name] += 1
            storm.restart_what_ended()
            storm.sample_queue(redis)
        storm.bring_back()
        storm.stop("producer")
        _drain(storm, redis)
        return storm, verdict(storm.outboxes(), storm.told)


def _drain(storm: Storm, redis: Redis) -> None:
    """Give every outbox a living relay until nothing is under way, or nothing has moved for long."""
    deadline, least = time.monotonic() + _DRAIN_SECONDS, sys.maxsize
    with ExitStack() as stack:
        producers = [stack.enter_context(HistoryProducer(redis, outbox=path)) for path in storm.outboxes()]
        while (depth := sum(producer.status().depth for producer in producers)) and time.monotonic() < deadline:
            if depth < least:
                deadline, least = time.monotonic() + _DRAIN_SECONDS, depth
            storm.restart_what_ended()
            storm.sample_queue(redis)
            time.sleep(0.2)

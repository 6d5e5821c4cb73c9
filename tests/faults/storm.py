"""Storm: controllers, workers and a relay run as processes, random faults of a seed occur, and a verdict follows."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
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

from consumers.db.engine import engine
from consumers.embedded.stack import embedded_stack
from producers.history_producer import HistoryProducer
from producers.redis_keys import reserved_key
from tests.faults.controllers import Controllers
from tests.faults.embedded_servers import EmbeddedServers, ServerName
from tests.faults.programs import shorten_intervals
from tests.faults.proxy import Proxy
from tests.faults.supervisor import Supervisor
from tests.faults.verdict import Verdict, verdict

_WORKERS = 2
_DRAIN_SECONDS = 400.0

Fault = Callable[[], str | None]
"""Function that causes a fault and may return a more exact name for it."""


@dataclass
class Storm:
    """Servers, programs and counts of one run."""

    home: Path
    dice: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    worst_queue_entries: int = 0

    def __post_init__(self) -> None:
        addresses = {"REDIS_URL": self.proxied_redis_url, "DATABASE_URL": self._proxied_database_url()}
        self.servers = EmbeddedServers(self.home)
        self.programs = Supervisor(self.home, addresses)
        self.controllers = Controllers(self.home, self.programs, self.dice)

    @property
    def proxied_redis_url(self) -> str:
        return f"unix://{quote(str(self.home / 'proxy-redis.sock'))}?db=0"

    def _proxied_database_url(self) -> str:
        return f"postgresql://postgres@/trading_history?host={quote(str(self.home / 'proxy'), safe='')}"

    def start_workers(self) -> None:
        """Start _WORKERS workers of this project and a stock RQ worker, which ends when it loses its connection."""
        for number in range(_WORKERS):
            self.programs.start(f"worker {number}", lambda: ["tests.faults.programs", "worker"])
        stock = ["rq.cli", "worker", "--url", self.proxied_redis_url, "--serializer", "json"]
        stock += ["--worker-class", "rq.SimpleWorker", "history"]
        self.programs.start(f"worker {_WORKERS}", lambda: stock)

    def kill_worker(self) -> None:
        self.programs.restart(self.dice.choice(self.programs.names("worker")))

    def cause(self, faults: Sequence[tuple[str, Fault]]) -> None:
        """Cause a random fault, then restart the programs that have ended."""
        name, fault = self.dice.choice(faults)
        self.faults[fault() or name] += 1
        self.faults.update(self.controllers.continue_faults())
        self.programs.restart_what_ended()

    def pause(self, server: ServerName, seconds: float) -> None:
        """Stop all processes of a server for `seconds`: clients stay connected and get no answer."""
        frozen: list[psutil.Process] = []
        with contextlib.suppress(FileNotFoundError, psutil.Error, ValueError):
            main = psutil.Process(self.servers.pid(server))
            frozen = [main, *main.children()]
        _send(frozen, signal.SIGSTOP)
        time.sleep(seconds)
        _send(frozen, signal.SIGCONT)

    def sample_queue(self, redis: Redis) -> None:
        """Update the highest number of times that one delivery is in the queue and the reservations together."""
        with contextlib.suppress(RedisError):
            ids = redis.lrange("rq:queue:history", 0, -1)
            for worker in redis.hkeys("history:owners:history"):
                ids += redis.lrange(reserved_key("history", as_text(worker)), 0, -1)
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


def _faults(storm: Storm, redis: Redis, redis_proxy: Proxy, database_proxy: Proxy) -> list[tuple[str, Fault]]:
    dice = storm.dice

    def kill_server(server: ServerName, number: signal.Signals) -> None:
        storm.servers.send(server, number)
        time.sleep(dice.random() * 2)
        storm.servers.bring_back()

    def without_aof() -> None:
        with contextlib.suppress(RedisError):  # it may be loading or unreachable
            redis.config_set("appendonly", "no")
        time.sleep(dice.random())
        kill_server("redis", signal.SIGKILL)

    faults: dict[str, Fault] = {
        "worker killed": storm.kill_worker,
        "controller killed": storm.controllers.kill_one,
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
        "table renamed": lambda: _rename_table_for(dice.random() * 2),
    }
    for name, proxy in (("redis", redis_proxy), ("postgres", database_proxy)):
        faults |= {
            f"{name} connections cut": proxy.cut,
            f"{name} connections half-closed": proxy.half_close,
            f"{name} refused": lambda proxy=proxy: _proxied(proxy, "refuse", dice.random() * 3),  # type: ignore[misc]  # a default binds the loop's proxy
            f"{name} swallowed": lambda proxy=proxy: _proxied(proxy, "swallow", dice.random() * 3),  # type: ignore[misc]  # likewise
            f"{name} slow": lambda proxy=proxy: _proxied(proxy, "delay", dice.random() * 3),  # type: ignore[misc]  # likewise
        }
    of_outboxes: dict[str, Fault] = {
        "outbox copied": storm.controllers.copy_one,
        "outbox backed up": storm.controllers.back_up_or_pause,
        "relay process steered": storm.controllers.steer_relay,
    }
    return [*faults.items(), *of_outboxes.items(), *of_outboxes.items()]


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
    """Cause faults for `seconds` in the empty folder `home`; then wait until all entries are settled, and judge."""
    shorten_intervals()
    storm = Storm(home, random.Random(seed))
    with ExitStack() as stack:
        stack.enter_context(embedded_stack(home))
        redis_proxy, database_proxy = stack.enter_context(_proxies(home))
        redis = Redis.from_url(os.environ["REDIS_URL"], socket_timeout=2)
        faults = _faults(storm, redis, redis_proxy, database_proxy)
        stack.callback(storm.programs.kill_all, "worker")
        stack.callback(storm.controllers.stop)
        storm.start_workers()
        storm.controllers.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(storm.dice.random() * 2)
            storm.cause(faults)
            storm.sample_queue(redis)
        storm.servers.bring_back()
        storm.controllers.stop()
        storm.faults["controller that exits after its event"] = storm.programs.starts["one-event"]
        with Redis.from_url(storm.proxied_redis_url) as proxied:
            _drain(storm, proxied)
            accepted = storm.controllers.accepted()
            outboxes, replaced = storm.controllers.outboxes(), storm.controllers.replaced
            return storm, verdict(outboxes, accepted, replaced=replaced, redis=proxied)


def _drain(storm: Storm, redis: Redis) -> None:
    """Run a relay for every outbox until all entries are settled, or until there is no progress for _DRAIN_SECONDS."""
    deadline, least = time.monotonic() + _DRAIN_SECONDS, sys.maxsize
    with ExitStack() as stack:
        producers = [stack.enter_context(HistoryProducer(redis, outbox=path)) for path in storm.controllers.outboxes()]
        while time.monotonic() < deadline:
            # The outboxes are counted twice: entries salvaged after the first count are in the second one.
            left = _depth(producers) + len(storm.controllers.damaged_files()) or _depth(producers)
            if not left:
                break
            if left < least:
                deadline, least = time.monotonic() + _DRAIN_SECONDS, left
            storm.programs.restart_what_ended()
            storm.sample_queue(redis)
            time.sleep(0.2)


def _depth(producers: Sequence[HistoryProducer]) -> int:
    return sum(producer.status().depth for producer in producers)

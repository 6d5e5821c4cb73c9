"""The pipeline of a night: the processes of two hosts, and what happens to them.

The bots' host runs two long-running controllers and a pool of two workers. The other host runs controllers from cron,
which record one event and exit, a relay for one of their two outboxes, and the API. For faults of outbox files, another
API has an outbox that no controller uses.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
from redis import Redis
from rq.suspension import resume, suspend
from rq.utils import as_text
from rq.worker_registration import WORKERS_BY_QUEUE_KEY
from sqlalchemy import text

from consumers.db.engine import engine
from consumers.ops.failed import discard
from consumers.ops.rejections import rejections
from producers.events import PortfolioSnapshot
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.redis_keys import owners_key, quarantine_key, reserved_key
from tests.factories import a_snapshot
from tests.faults.accepted import AcceptedFile, accepted_by_controller, delivery_of_receipt
from tests.faults.embedded_servers import EmbeddedServers
from tests.faults.supervisor import Supervisor
from tests.faults.verdict import Verdict, verdict
from tests.ports import free_port

_PROGRAMS = "tests.faults.programs"
_RECORD_PAUSE_SECONDS = 1.0  # at most, between two events of a long-running controller
_CRON_SECONDS = 15.0
_LATE_SECONDS = 600.0  # age of the late controller's events
_WORKERS = 2
_WAIT_SECONDS = 60.0  # for a process, a reservation, the last entries
_PORTFOLIOS = {"bot": 1, "bot-2": 2, "cron": 3, "cron-alone": 4, "late": 5, "by-hand": 6, "spare": 7}
_START_SECONDS = 180.0  # of an API on a busy machine
_OLD_SNAPSHOT_AGE = timedelta(hours=27)
_PAGE_BYTES = 4096  # SQLite's


class Pipeline:
    """Processes of the night. Everything is in the folder `home`, in which the embedded servers run."""

    def __init__(self, home: Path, dice: random.Random, *, has_spare_outbox: bool) -> None:
        self.home, self._dice, self._has_spare_outbox = home, dice, has_spare_outbox
        self.servers = EmbeddedServers(home)
        for folder in ("accepted", "bots", "bot-host", "cron-host"):
            (home / folder).mkdir()
        for name in _PORTFOLIOS:
            (home / "bots" / name).mkdir()
        self._bot_host = Supervisor(home / "bot-host", {"HISTORY_OUTBOX": str(self._outbox("bot"))})
        self._cron_host = Supervisor(home / "cron-host", {"HISTORY_OUTBOX": str(self._outbox("cron"))})
        self._redis = Redis.from_url(os.environ["REDIS_URL"], socket_timeout=5)
        self._worker_port, self._api_port, self._spare_port = _free_ports(_WORKERS), free_port(), free_port()
        self._cron_runs, self._cron_at = 0, 0.0
        self._by_hand = HistoryProducer(outbox=self._outbox("by-hand"), name="by-hand")
        self._by_hand_file = AcceptedFile(home / "accepted" / "by-hand.0.jsonl")

    @property
    def _api_ports(self) -> list[int]:
        return [self._api_port, self._spare_port] if self._has_spare_outbox else [self._api_port]

    @property
    def targets(self) -> dict[str, list[str]]:
        """Addresses that Prometheus scrapes, by job."""
        workers = [f"127.0.0.1:{self._worker_port + number}" for number in range(_WORKERS)]
        return {
            "trading-history-worker": workers,
            "trading-history-api": [f"127.0.0.1:{port}" for port in self._api_ports],
        }

    def _outbox(self, name: str) -> Path:
        return self.home / "bots" / name / "outbox.db"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the processes during the block, and wait at its start until the workers and the API answer."""
        try:
            self.start_workers()
            self.start_relay()
            self.start_api()
            if self._has_spare_outbox:
                Outbox(self._outbox("spare")).close()
                self._start_spare_api()
            while self._redis.scard(WORKERS_BY_QUEUE_KEY % "history") < _WORKERS or not self._api_answers():
                self._bot_host.restart_what_ended()
                self._cron_host.restart_what_ended()
                time.sleep(0.2)
            self._start_controller("bot")
            self._start_controller("bot-2")
            yield
        finally:
            self.unfreeze()
            self._by_hand.close(0)
            for host in (self._bot_host, self._cron_host):
                for child in self._children(host):
                    with contextlib.suppress(psutil.Error):
                        child.kill()
                host.kill_all("workers", "relay", "api", "controller", "cron")

    def _api_answers(self) -> bool:
        listening = {
            one.laddr.port for one in psutil.net_connections("tcp4") if one.status == psutil.CONN_LISTEN and one.laddr
        }
        return set(self._api_ports) <= listening

    def tick(self) -> None:
        """Start the programs that have ended, and the next controller from cron."""
        self._bot_host.restart_what_ended()
        self._cron_host.restart_what_ended()
        if time.monotonic() >= self._cron_at:
            self._cron_at = time.monotonic() + _CRON_SECONDS
            for name in self._cron_host.names("cron"):
                if not self._cron_host.is_running(name):
                    self._cron_host.kill(name)  # forgets the program that has ended
            self._start_cron()

    def _start_cron(self) -> None:
        """Start a controller. Those whose outbox a relay process serves are killed as soon as they have recorded."""
        self._cron_runs += 1
        relayed = self._cron_runs % 2 == 1
        arguments = self._controller("cron" if relayed else "cron-alone", self._cron_runs)
        arguments += ["--count", "1", "--end", "kill" if relayed else "return"]
        self._cron_host.start(f"cron {self._cron_runs}", lambda: arguments, restarts=False)

    def _start_controller(self, name: str, *more: str) -> None:
        starts = iter(range(10**6))
        pause = ["--pause", str(_RECORD_PAUSE_SECONDS)]
        self._bot_host.start(f"controller {name}", lambda: [*self._controller(name, next(starts)), *pause, *more])

    def _controller(self, name: str, number: int) -> list[str]:
        accepted = self.home / "accepted" / f"{name}.{number}.jsonl"
        files = ["--outbox", str(self._outbox(name)), "--accepted", str(accepted)]
        seed, portfolio = str(self._dice.randrange(10**6)), str(_PORTFOLIOS[name])
        return [_PROGRAMS, "report", *files, "--name", name, "--seed", seed, "--portfolio", portfolio]

    def start_workers(self) -> None:
        options = ["--processes", str(_WORKERS), "--metrics-port", str(self._worker_port)]
        self._bot_host.start("workers 0", lambda: ["consumers.cli", "worker", *options])

    def stop_workers(self) -> None:
        """Stop the pool, which is the supervisor of the workers."""
        self._bot_host.stop("workers 0")

    def start_relay(self) -> None:
        self._cron_host.start("relay 0", lambda: ["consumers.cli", "relay", "--outbox", str(self._outbox("cron"))])

    def kill_relay(self) -> None:
        self._cron_host.kill("relay 0")

    def start_api(self) -> None:
        self._cron_host.start("api 0", lambda: ["consumers.cli", "api", "--port", str(self._api_port)])

    def _start_spare_api(self, *options: str) -> None:
        """Start the API that exports the metrics of the spare outbox, which no controller uses."""
        environment = ["--outbox", str(self._outbox("spare")), "--port", str(self._spare_port)]
        self._cron_host.start("api spare", lambda: [_PROGRAMS, "api", *environment, *options])

    def start_api_again(self) -> None:
        self.start_api()
        self._wait_for_api()

    def _wait_for_api(self) -> float:
        deadline = time.monotonic() + _START_SECONDS
        while not self._api_answers():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the API does not answer within {_START_SECONDS:.0f} s")
            time.sleep(0.2)
        return time.time()

    def kill_api(self) -> None:
        self._cron_host.kill("api 0")

    def start_late_controller(self) -> None:
        self._start_controller("late", "--late", str(_LATE_SECONDS))

    def stop_late_controller(self) -> None:
        self._bot_host.kill("controller late")

    def stop_database(self) -> None:
        self.servers.stop("postgres", signal.SIGINT)

    def stop_redis(self) -> None:
        self.servers.stop("redis", signal.SIGTERM)

    def suspend_workers(self) -> None:
        suspend(self._redis)

    def resume_workers(self) -> None:
        resume(self._redis)

    def enqueue_an_unusable_entry(self) -> None:
        self._redis.lpush("rq:queue:history", b"\xff no job id")

    def delete_quarantined(self) -> None:
        self._redis.delete(quarantine_key("history"))

    def lower_the_limit_of_the_spare_outbox(self) -> float:
        """Start its API with a limit that the new, empty outbox has reached. Return the time when it answers."""
        self._cron_host.kill("api spare")
        self._start_spare_api("--max-bytes", str(self._outbox("spare").stat().st_size))
        return self._wait_for_api()

    def raise_the_limit_of_the_spare_outbox(self) -> None:
        self._cron_host.kill("api spare")
        self._start_spare_api()
        self._wait_for_api()

    def damage_the_spare_outbox(self) -> None:
        self._outbox("spare").rename(self._outbox("spare").with_name("kept.db"))
        self._outbox("spare").write_bytes(b"no database at all" * 1000)

    def repair_the_spare_outbox(self) -> None:
        self._outbox("spare").with_name("kept.db").rename(self._outbox("spare"))

    def damage_the_spare_outbox_under_a_controller(self) -> None:
        """Overwrite all pages but the first, and start a controller, which quarantines and salvages the file."""
        content = self._outbox("spare").read_bytes()
        self._outbox("spare").write_bytes(content[:_PAGE_BYTES] + bytes(len(content) - _PAGE_BYTES))
        with HistoryProducer(outbox=self._outbox("spare"), name="spare"):
            pass
        if not self._quarantined_spare_files():
            raise RuntimeError("the controller did not quarantine the damaged outbox")

    def delete_the_quarantined_spare_outbox(self) -> None:
        for file in self._quarantined_spare_files():
            file.unlink()

    def _quarantined_spare_files(self) -> list[Path]:
        with Outbox(self._outbox("spare")) as outbox:
            return [*outbox.quarantine.damaged_files(), *outbox.quarantine.salvaged_files()]

    def freeze(self) -> None:
        """Stop the workers and the API by SIGSTOP."""
        for process in self._scraped():
            process.suspend()

    def unfreeze(self) -> None:
        for process in self._scraped():
            with contextlib.suppress(psutil.Error):
                process.resume()

    def _scraped(self) -> list[psutil.Process]:
        pids = [self._cron_host.pid(name) for name in self._cron_host.names("api")]
        with contextlib.suppress(psutil.Error):
            return [*self._children(self._bot_host), *(psutil.Process(pid) for pid in pids if pid is not None)]
        return []

    def _children(self, host: Supervisor) -> list[psutil.Process]:
        pids = [host.pid(name) for name in host.names("workers")]
        with contextlib.suppress(psutil.Error):
            return [child for pid in pids if pid is not None for child in psutil.Process(pid).children()]
        return []

    def kill_a_worker_with_reserved_jobs(self) -> None:
        """Lock the history table until a worker has reserved jobs, and kill it."""
        with engine().begin() as db:
            db.execute(text("LOCK TABLE portfolio_history IN ACCESS EXCLUSIVE MODE"))
            deadline = time.monotonic() + _WAIT_SECONDS
            while (pid := self._pid_with_reserved_jobs()) is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no worker reserved jobs within {_WAIT_SECONDS:.0f} s")
                time.sleep(0.05)
            time.sleep(0.5)  # by then the insert waits for the lock
            os.kill(pid, signal.SIGKILL)

    def _pid_with_reserved_jobs(self) -> int | None:
        for owner in map(as_text, self._redis.hkeys(owners_key("history"))):
            pid = self._redis.hget(f"rq:worker:{owner.rpartition(':')[0]}", "pid")
            if pid is not None and self._redis.llen(reserved_key("history", owner)):
                return int(pid)
        return None

    def record_a_conflict(self) -> None:
        """Record two events with the same id and different content; the second one is rejected."""
        now = datetime.now(UTC)
        for balance in (1, 2):
            self._record(a_snapshot(timestamp=now, snapshot_date=now.date(), portfolio_id=1, balance=balance))

    def discard_rejected(self) -> None:
        discard(rejections(), self._redis, "history", "part of the night")

    def record_an_old_snapshot(self) -> None:
        self._record_snapshot(datetime.now(UTC) - _OLD_SNAPSHOT_AGE)

    def record_a_new_snapshot(self) -> None:
        self._record_snapshot(datetime.now(UTC))

    def _record_snapshot(self, at: datetime) -> None:
        self._record(a_snapshot(timestamp=at, snapshot_date=at.date(), portfolio_id=_PORTFOLIOS["by-hand"]))

    def _record(self, snapshot: PortfolioSnapshot) -> None:
        self._by_hand_file.write(delivery_of_receipt(self._by_hand.record(snapshot), snapshot))

    def verdict(self) -> Verdict:
        """Stop the controllers, wait until each entry of the outboxes is settled, and judge the events."""
        for host in (self._bot_host, self._cron_host):
            host.kill_all("controller", "cron")
        outboxes = sorted(self.home.glob("bots/*/outbox.db"))
        deadline = time.monotonic() + _WAIT_SECONDS
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(HistoryProducer(outbox=path)) for path in outboxes]
            while sum(producer.status().depth for producer in others) and time.monotonic() < deadline:
                time.sleep(0.1)
        return verdict(outboxes, accepted_by_controller(self.home / "accepted"), redis=self._redis)


def _free_ports(count: int) -> int:
    """Return the first of `count` consecutive ports that nobody listens at now."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in range(count):
                stack.enter_context(_bound(first + number))
            return first


@contextmanager
def _bound(port: int) -> Iterator[None]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", port))
        yield

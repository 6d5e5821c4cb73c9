"""One run of the benchmark `quality`: `python -m tests.benchmarks.quality_run WORKER_KIND KIND TIMES`.

It starts new servers, a producer and workers, causes TIMES faults of one kind during a steady load, and prints
`loaded` when the load has ended. Then it waits until every accepted event is a row and the queue is empty, at most
WAIT_SECONDS, and prints a JSON object: its RunFigures.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from rq.worker_registration import REDIS_WORKER_KEYS
from sqlalchemy import text

from consumers.db.engine import engine
from consumers.embedded import postgres, servers
from tests.benchmarks.checks import wait_for_progress
from tests.benchmarks.environment import bench_stack, queue_name, redis
from tests.benchmarks.peer import PGQUEUER
from tests.benchmarks.quality_counts import LEAD_SECONDS, Fault, RunFigures, Stored, count_figures, queue_pushes
from tests.benchmarks.quality_faults import KINDS, PRODUCER, FaultKind, Pipeline, begin
from tests.benchmarks.quality_producer import accepted_numbers
from tests.faults.proxy import Proxy
from tests.faults.supervisor import Supervisor
from tests.relaying import states, unsettled

WORKER_KINDS = ("HistoryWorker", "RQ SimpleWorker", PGQUEUER.name)
CALLS = 5  # per second; the slowest worker must keep up with them on a busy machine
WAIT_SECONDS = 360.0
_SUPERVISED_SECONDS = 1.0  # how often the supervisor starts what has ended
_POOL = 11  # connections of a worker of PgQueuer

# Rows that a table without the unique key would have: a trigger copies the id of each row that is to be inserted. The
# copies of a transaction that is rolled back vanish with it.
_ATTEMPTS = """
    CREATE TABLE insert_attempts (event_id uuid);
    CREATE FUNCTION note_attempt() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN INSERT INTO insert_attempts VALUES (NEW.event_id); RETURN NEW; END';
    CREATE TRIGGER note_attempt BEFORE INSERT ON portfolio_history FOR EACH ROW EXECUTE FUNCTION note_attempt();
"""
_ROWS = text("""
    SELECT "timestamp", extract(epoch FROM pg_xact_commit_timestamp(stored.xmin)), attempts
    FROM portfolio_history AS stored JOIN (
        SELECT event_id, count(*) AS attempts FROM insert_attempts GROUP BY event_id) AS counted USING (event_id)
""")


@dataclass(frozen=True)
class Run:
    """One kind of worker and one kind of fault, which begins `times` times."""

    worker_kind: str
    kind: FaultKind
    times: int

    @property
    def uses_outbox(self) -> bool:
        return self.worker_kind != PGQUEUER.name

    @property
    def gap(self) -> float:
        """Seconds from the beginning of a fault to that of the next one."""
        return self.kind.seconds + self.kind.apart_seconds

    @property
    def seconds(self) -> float:
        return LEAD_SECONDS + self.times * self.gap

    @property
    def rate(self) -> float:
        """Events per second."""
        return CALLS / self.kind.calls

    @property
    def events(self) -> int:
        return int(self.rate * self.seconds)

    def worker(self, redis_url: str) -> list[str]:
        """Return the arguments of Python that start a worker."""
        if self.worker_kind == "HistoryWorker":
            return ["consumers.cli", "worker"]
        if self.worker_kind == PGQUEUER.name:
            return [PGQUEUER.job]
        simple = ["--worker-class", "rq.SimpleWorker", "--serializer", "json"]
        return ["rq.cli", "worker", "--url", redis_url, *simple, queue_name()]

    def producer(self, folder: Path) -> list[str]:
        numbers = ["--rate", str(self.rate), "--count", str(self.events), "--calls", str(self.kind.calls)]
        queue = "outbox" if self.uses_outbox else "pgqueuer"
        return ["tests.benchmarks.quality_producer", queue, str(folder), *numbers]


@contextmanager
def _pipeline(run: Run) -> Iterator[Pipeline]:
    """Run the servers, the proxies before them, and the workers, and prepare the database."""
    with ExitStack() as stack:
        home = stack.enter_context(bench_stack())
        with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            db.execute(text(_ATTEMPTS))
            db.execute(text("ALTER SYSTEM SET track_commit_timestamp = on"))
        if not run.uses_outbox:
            asyncio.run(PGQUEUER.fresh_queue())
        postgres.server(home).stop()
        with servers(home):
            engine().dispose()
        (home / "proxy").mkdir()
        redis_proxy = Proxy(home / "proxy-redis.sock", home / "valkey.sock")
        database_proxy = Proxy(home / "proxy" / postgres.SOCKET, home / "postgres" / postgres.SOCKET)
        for proxy in (redis_proxy, database_proxy):
            stack.enter_context(proxy.running())
        proxied = {
            "REDIS_URL": f"unix://{quote(str(home / 'proxy-redis.sock'))}?db=0",
            "DATABASE_URL": f"postgresql://postgres@/{postgres.DATABASE}?host={quote(str(home / 'proxy'), safe='')}",
        }
        addresses = {name: url if name == run.kind.proxied else os.environ[name] for name, url in proxied.items()}
        programs = Supervisor(home, addresses)
        stack.callback(programs.kill_all, "worker", "producer")
        for number in range(run.kind.workers):
            programs.start(f"worker {number}", lambda: run.worker(addresses["REDIS_URL"]))
        wait_for_progress(partial(_ready, run), run.kind.workers, pause=0.05)
        yield Pipeline(home, programs, redis_proxy, database_proxy)


def _ready(run: Run) -> int:
    """Return how many workers wait for jobs."""
    if run.uses_outbox:
        with redis() as client:
            return int(client.scard(REDIS_WORKER_KEYS))
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with engine().connect() as db:
        return int(db.execute(text(sessions)).scalar_one()) // _POOL


def _load(run: Run, pipeline: Pipeline) -> tuple[float, list[Fault]]:
    """Let the producer offer all events and cause the faults; return when it started, and the faults."""
    home, programs = pipeline.home, pipeline.programs
    programs.start(PRODUCER, lambda: run.producer(home))
    wait_for_progress((home / "accepted").exists, 1, pause=0.05)
    started = time.time() + 1.0
    (home / "start.new").write_text(str(started))
    (home / "start.new").rename(home / "start")
    faults: list[Fault] = []
    times = run.times if run.kind.begin is not None else 0
    supervised = began = 0.0
    while (now := time.time()) < started + run.seconds:
        if now > supervised + _SUPERVISED_SECONDS:
            programs.restart_what_ended()
            supervised = now
        if began and now > began + run.kind.seconds:
            if run.kind.end is not None:
                run.kind.end(pipeline)
            faults.append(Fault(began - started, time.time() - started))
            began = 0.0
        elif not began and len(faults) < times and now > started + LEAD_SECONDS + len(faults) * run.gap:
            began = now
            begin(run.kind, pipeline)
        time.sleep(0.02)
    return started, faults


def _is_quiet(run: Run, home: Path) -> bool:
    """Return whether every accepted event is a row and no job is left."""
    with engine().connect() as db:
        stored = int(db.execute(text("SELECT count(*) FROM portfolio_history")).scalar_one())
        if stored < len(set(accepted_numbers(home))):
            return False
        if not run.uses_outbox:
            return not db.execute(text("SELECT count(*) FROM pgqueuer")).scalar_one()
    return not unsettled(home / "outbox.db")


def _wait_until_quiet(run: Run, pipeline: Pipeline) -> float:
    """Wait at most WAIT_SECONDS, and return the seconds."""
    began = time.monotonic()
    while time.monotonic() < began + WAIT_SECONDS and not _is_quiet(run, pipeline.home):
        pipeline.programs.restart_what_ended()
        time.sleep(_SUPERVISED_SECONDS)
    return time.monotonic() - began


def run_once(run: Run) -> RunFigures:
    """Run it to its end and return the outcome; print `loaded` when the load has ended."""
    with _pipeline(run) as pipeline:
        started, faults = _load(run, pipeline)
        print("loaded", flush=True)
        waited = _wait_until_quiet(run, pipeline)
        with engine().connect() as db:
            rows = db.execute(_ROWS).all()
        entries = None
        if run.uses_outbox:
            pushes = queue_pushes(pipeline.home / "valkey/appendonlydir", f"rq:queue:{queue_name()}")
            entries = pushes / sum(states(pipeline.home / "outbox.db").values())
        calls = run.events * run.kind.calls
        accepted = accepted_numbers(pipeline.home)
        stored = [Stored(at, float(committed) - started, attempts) for at, committed, attempts in rows]
        return count_figures(calls, accepted, stored, faults=faults, rate=run.rate, entries=entries, waited=waited)


def main() -> None:
    worker_kind, kind, times = sys.argv[1:]
    print(json.dumps(asdict(run_once(Run(worker_kind, KINDS[kind], int(times))))), flush=True)


if __name__ == "__main__":
    main()

"""The end of a controller: it waits briefly for its acknowledgements, and others send the entries that it leaves."""

from __future__ import annotations

import os
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from redis import Redis

from consumers.operations import get_portfolio_history
from producers.outbox import Outbox
from tests.factories import a_snapshot
from tests.relaying import TWO_EVENTS, a_proxy, a_relay, a_worker, run_script, states
from tests.rq_programs import until

_WAIT_SECONDS = 2.0  # limit for all producers together
_SLACK_SECONDS = 1.0  # for the exit of the interpreter on a busy machine


@pytest.fixture(autouse=True)
def outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "outbox.db"))
    return tmp_path / "outbox.db"


def test_a_controller_waits_until_its_own_events_are_settled(
    redis: Redis, database_url: str, tmp_path: Path, outbox: Path
) -> None:
    """It does not wait for a sent event of another producer, which is never acknowledged."""
    with Outbox(outbox) as other:
        other.append("other", [a_snapshot()], producer_id=1)
    with closing(sqlite3.connect(outbox)) as db:
        db.execute("INSERT INTO retries SELECT position, '', 1, (SELECT clock_shown + 250 FROM outbox) FROM entries")
        db.commit()
    with a_worker(redis, tmp_path / "worker.log"):
        ended = run_script(TWO_EVENTS, tmp_path)
    assert (ended.returncode, ended.errors) == (0, "")
    assert states(outbox) == {"sent": 1, "stored": 2}
    assert ended.seconds < _WAIT_SECONDS


_THREE_PRODUCERS = """
import os, time
from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot

for number in range(3):
    HistoryProducer(outbox=f"{os.environ['HISTORY_OUTBOX']}{number}").record(a_snapshot())
print(time.monotonic(), flush=True)
"""


def test_a_controller_without_a_worker_waits_2_s_for_all_producers_together(
    redis: Redis, tmp_path: Path, outbox: Path
) -> None:
    """Its entries are sent."""
    ended = run_script(_THREE_PRODUCERS, tmp_path)
    assert (ended.returncode, ended.errors) == (0, "")
    assert [states(Path(f"{outbox}{number}")) for number in range(3)] == [{"sent": 1}] * 3
    assert _WAIT_SECONDS - 0.5 < ended.seconds < _WAIT_SECONDS + _SLACK_SECONDS


@pytest.mark.parametrize("mode", ["refuse", "swallow"])
def test_a_controller_without_redis_waits_2_s_and_a_relay_delivers_later(
    redis: Redis, database_url: str, tmp_path: Path, outbox: Path, mode: str
) -> None:
    """Redis refuses connections, or accepts them and never answers."""
    with a_proxy(os.environ["REDIS_URL"], tmp_path) as (proxy, url):
        proxy.set_mode(mode)  # type: ignore[arg-type]  # one of its modes
        ended = run_script(_THREE_PRODUCERS, tmp_path, REDIS_URL=url)
        outboxes = [Path(f"{outbox}{number}") for number in range(3)]
        assert (ended.returncode, "Traceback" in ended.errors) == (0, False)
        assert [states(one) for one in outboxes] == [{"pending": 1}] * 3
        assert ended.seconds < _WAIT_SECONDS + _SLACK_SECONDS
        proxy.set_mode("pass")
        options = [option for one in outboxes for option in ("--outbox", one)]
        with a_worker(redis, tmp_path / "worker.log"), a_relay(tmp_path / "relay.log", *options, REDIS_URL=url):
            until(lambda: [states(one) for one in outboxes] == [{"stored": 1}] * 3)
    assert len(get_portfolio_history()) == 1  # the same fact three times


def test_a_controller_does_not_wait_while_a_relay_process_runs(redis: Redis, tmp_path: Path, outbox: Path) -> None:
    """No worker runs: without the relay process, it would wait 2 s."""
    Outbox(outbox).close()
    with a_relay(tmp_path / "relay.log"):
        ended = run_script(TWO_EVENTS, tmp_path)
        assert (ended.returncode, ended.errors) == (0, "")
        assert ended.seconds < _WAIT_SECONDS
        until(lambda: states(outbox) == {"sent": 2})


# Starts children that record and end, and prints the states of the entries after that.
_CHILDREN = """
import multiprocessing, os, sys, time
from datetime import timedelta
from pathlib import Path

if sys.argv[2] == "process":  # otherwise only the children import it
    import producers.trading_controller

def record(number):
    from producers.trading_controller import create_daily_portfolio_snapshot
    from tests.factories import INSTANT
    create_daily_portfolio_snapshot({"balance": number}, portfolio_id=number, timestamp=INSTANT)

def record_in_a_loop(number):
    import asyncio
    from producers.aio import create_daily_portfolio_snapshot
    from tests.factories import INSTANT
    asyncio.run(create_daily_portfolio_snapshot({"balance": number}, portfolio_id=number, timestamp=INSTANT))

if __name__ == "__main__":
    method, kind = sys.argv[1:]
    context = multiprocessing.get_context(method)
    if kind in ("process", "asyncio"):
        target = record if kind == "process" else record_in_a_loop
        children = [context.Process(target=target, args=(number,)) for number in range(3)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 3
    else:
        with context.Pool(2) as pool:
            pool.map(record, range(3), chunksize=1)
            pool.close()
            pool.join()
    from tests.relaying import states
    print(states(Path(os.environ["HISTORY_OUTBOX"])))
    print(time.monotonic())
"""


@pytest.mark.parametrize("kind", ["process", "pool", "asyncio"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_children_wait_until_their_events_are_settled(
    redis: Redis, database_url: str, tmp_path: Path, method: str, kind: str
) -> None:
    """They do not run atexit functions, and no other process has the outbox open."""
    with a_worker(redis, tmp_path / "worker.log"):
        ended = run_script(_CHILDREN, tmp_path, method, kind)
    assert (ended.returncode, ended.errors) == (0, "")
    assert ended.printed.startswith("{'stored': 3}\n")


# Starts children that are killed as soon as they have recorded. The parent, with or without a producer, waits until all
# entries are sent and prints how long that takes.
_KILLED = """
import multiprocessing, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot
from tests.relaying import states

OUTBOX = Path(os.environ["HISTORY_OUTBOX"])

def record(number):
    producer = HistoryProducer()
    for n in range(20):
        producer.record(a_snapshot(portfolio_id=number, after=timedelta(n)))
    return producer

def record_and_die(number):
    record(number)
    os.kill(os.getpid(), signal.SIGKILL)

def record_and_stay(number):
    record(number)

if __name__ == "__main__":
    method, how, parent = sys.argv[1:]
    producer = HistoryProducer() if parent == "producer" else None
    context = multiprocessing.get_context(method)
    if how == "killed":
        children = [context.Process(target=record_and_die, args=(number,)) for number in range(3)]
        for child in children:
            child.start()
        for child in children:
            child.join()
    else:
        pool = context.Pool(3)
        pool.map(record_and_stay, range(3), chunksize=1)
        pool.terminate()
        pool.join()
    gone = time.monotonic()
    while states(OUTBOX).get("pending") and time.monotonic() < gone + 20:
        time.sleep(0.01)
    print(states(OUTBOX), time.monotonic() - gone, flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(
    "how",
    ["fork killed producer", "fork terminated relay", "spawn killed relay", "forkserver terminated producer"],
)
def test_entries_of_killed_children_are_sent_within_a_second(
    redis: Redis, tmp_path: Path, outbox: Path, how: str
) -> None:
    """A producer of their parent sends them, or a relay process."""
    Outbox(outbox).close()
    with ExitStack() as running:
        if how.endswith("relay"):
            running.enter_context(a_relay(tmp_path / "relay.log"))
        ended = run_script(_KILLED, tmp_path, *how.split())
    assert (ended.returncode, ended.errors) == (0, "")
    assert ended.printed.startswith("{'sent': 60}"), ended.printed
    assert float(ended.printed.split()[-1]) < 1.0


# The pool is neither closed nor terminated: its children record until multiprocessing terminates them when their parent
# ends.
_FORGOTTEN_POOL = """
import multiprocessing, os, time
from datetime import timedelta
from pathlib import Path
from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot
from tests.relaying import states

def record(number):
    producer = HistoryProducer()
    for n in range(10**6):
        producer.record(a_snapshot(portfolio_id=number, after=timedelta(seconds=n)))

if __name__ == "__main__":
    producer = HistoryProducer()
    pool = multiprocessing.get_context("fork").Pool(2)
    pool.map_async(record, range(2), chunksize=1)
    outbox = Path(os.environ["HISTORY_OUTBOX"])
    while sum(states(outbox).values()) < 20:
        time.sleep(0.01)
    print(time.monotonic(), flush=True)
"""


def test_a_controller_sends_the_entries_of_its_terminated_pool(redis: Redis, tmp_path: Path, outbox: Path) -> None:
    """The parent closes its producer after the children are terminated."""
    ended = run_script(_FORGOTTEN_POOL, tmp_path)
    assert (ended.returncode, ended.errors) == (0, "")
    assert set(states(outbox)) == {"sent"}

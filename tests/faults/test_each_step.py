"""Each step of an event's delivery: a process is killed there with SIGKILL, and no event is lost or duplicated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from redis import Redis

from producers import entry_sender
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.redis_keys import lease_key
from tests.faults.accepted import Accepted, read_accepted
from tests.faults.programs import CARRY_OVER_STEPS, EXCHANGE_STEPS, PRODUCER_STEPS, WORKER_STEPS
from tests.faults.verdict import Verdict, verdict

pytestmark = pytest.mark.usefixtures("database_url", "redis")

ROOT = Path(__file__).parents[2]
NAME = "trading-controller"
_PAGE = 4096


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run one of the fault programs until the end of the block. If the test fails, pytest shows its stderr."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.programs", *arguments],
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run_producer(folder: Path, *options: str, seconds: float = 60, **environment: str) -> tuple[int, Accepted]:
    """Run a producer on `outbox.db` in this folder until it ends; return its exit status and the accepted events."""
    accepted = folder / "accepted.jsonl"
    files = ("--outbox", str(folder / "outbox.db"), "--accepted", str(accepted))
    with started("producer", *files, *options, **environment) as producer:
        producer.communicate(timeout=seconds)
    return producer.returncode, read_accepted(accepted)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.05)


def settle_the_rest(redis: Redis, outboxes: Sequence[Path], worker: subprocess.Popen[str]) -> None:
    """Open new producers on these outboxes and wait until their entries, and those of damaged files, are settled."""

    def settled() -> bool:
        assert worker.poll() is None, "the worker has ended"
        return depth() == 0 and not _damaged_files(outboxes[0].parent) and depth() == 0

    def depth() -> int:
        return sum(producer.status().depth for producer in producers)

    with ExitStack() as stack:
        producers = [stack.enter_context(HistoryProducer(redis, outbox=path, name=NAME)) for path in outboxes]
        _until(settled, 40)


def _damaged_files(folder: Path) -> list[Path]:
    """Return the quarantined files that are not salvaged yet; afterwards their entries are in the outbox."""
    return [file for file in folder.glob("*.damaged-*") if not file.name.endswith("-wal")]


def stop_worker(worker: subprocess.Popen[str]) -> None:
    worker.terminate()
    worker.communicate(timeout=20)
    # The signal kills a worker that has not installed its handler yet.
    assert worker.returncode in (0, -signal.SIGTERM)


def judge(accepted: Accepted, *outboxes: Path) -> Verdict:
    return verdict(outboxes, {"producer": accepted})


@pytest.mark.parametrize("step", PRODUCER_STEPS)
@pytest.mark.parametrize("times", [1, 3])
def test_a_killed_producer_loses_no_event(
    redis: Redis, tmp_path: Path, step: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process that opens the outbox delivers the accepted events."""
    monkeypatch.setattr(entry_sender, "_FIRST_CHECK_SECONDS", 0.5)
    outbox = tmp_path / "outbox.db"
    options = ("--seed", "7", "--count", "40", "--pause", "0.01", "--settle-every", "10")
    with started("worker") as worker:
        status, accepted = run_producer(tmp_path, *options, FAULT_STEP=step, FAULT_TIMES=str(times))
        assert status == -signal.SIGKILL
        settle_the_rest(redis, [outbox], worker)
        stop_worker(worker)

    judged = judge(accepted, outbox)
    assert judged.breaches == []
    assert judged.accepted >= len(accepted.deliveries)


@pytest.mark.parametrize("step", EXCHANGE_STEPS)
def test_a_relay_killed_while_it_exchanges_the_token_keeps_its_source(redis: Redis, tmp_path: Path, step: str) -> None:
    """The outbox recognises both tokens that Redis may have. No other outbox has used the source."""
    outbox = tmp_path / "outbox.db"
    options = ("--seed", "7", "--count", "40", "--pause", "0.01")
    with started("worker") as worker:
        for _ in range(2):  # the first relay finds no token in Redis, the second one finds its own
            status, accepted = run_producer(tmp_path, *options, FAULT_STEP=step)
            assert status == -signal.SIGKILL
        settle_the_rest(redis, [outbox], worker)
        stop_worker(worker)

    with Outbox(outbox) as one:
        assert [source.current for source in one.sources()] == [True] * len(one.sources())
    judged = judge(accepted, outbox)
    assert judged.breaches == []


@pytest.mark.parametrize("step", CARRY_OVER_STEPS)
def test_a_producer_killed_while_it_carries_entries_over_loses_no_event(
    redis: Redis, tmp_path: Path, step: str
) -> None:
    """The outbox was renamed while it was open. Both files exist and may have the same entries."""
    moved = tmp_path / "moved-outbox.db"
    options = ("--seed", "7", "--count", "40", "--pause", "0.01", "--move-after", "20")
    status, accepted = run_producer(tmp_path, *options, FAULT_STEP=step)
    assert status == -signal.SIGKILL
    assert moved.exists()
    assert len(accepted.deliveries) >= 20
    redis.flushall()
    with started("worker") as worker:
        settle_the_rest(redis, [tmp_path / "outbox.db", moved], worker)
        stop_worker(worker)

    judged = judge(accepted, tmp_path / "outbox.db", moved)
    assert judged.breaches == []


_QUARANTINES = [
    ("before quarantine", 1, False),
    ("before a rename", 1, False),
    ("after a rename", 1, False),
    ("before a rename", 1, True),
    ("after a rename", 1, True),  # the log has its new name, the file not yet
    ("after a rename", 2, True),
    ("after quarantine", 1, False),
    ("while salvaging", 1, False),
    ("while salvaging", 10, True),
    ("before noting losses", 1, False),
    ("before a rename", 2, False),  # of the salvaged file
    ("after a rename", 2, False),
    ("after a rename", 3, True),
]


@pytest.mark.parametrize(("step", "times", "log"), _QUARANTINES)
def test_a_producer_killed_while_it_quarantines_a_damaged_file_loses_no_event(
    redis: Redis, tmp_path: Path, step: str, times: int, log: bool
) -> None:
    """The root page of the table is destroyed, its rows are not. With `log`, the last row is in the log file only."""
    outbox = tmp_path / "outbox.db"
    run_producer(tmp_path, "--seed", "7", "--count", "40")
    with ExitStack() as stack:
        if log:  # while another process has it open, SQLite does not checkpoint the log
            stack.enter_context(_opened_elsewhere(outbox))
            run_producer(tmp_path, "--seed", "7", "--first", "40", "--count", "1")
        _destroy_inner_pages(outbox)
        assert outbox.with_name("outbox.db-wal").exists() == log
        redis.flushall()
        options = ("--seed", "7", "--first", "41", "--count", "40", "--pause", "0.1")
        status, accepted = run_producer(tmp_path, *options, FAULT_STEP=step, FAULT_TIMES=str(times))
    assert status == -signal.SIGKILL
    assert len(accepted.deliveries) >= 40 + log
    with started("worker") as worker:
        settle_the_rest(redis, [outbox], worker)
        stop_worker(worker)

    judged = judge(accepted, outbox)
    assert judged.breaches == []
    assert list(tmp_path.glob("outbox.db.salvaged-*"))


@contextmanager
def _opened_elsewhere(outbox: Path) -> Iterator[None]:
    program = f"""
import sqlite3
db = sqlite3.connect({str(outbox)!r})
print(db.execute("SELECT count(*) FROM entries").fetchone(), flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def _destroy_inner_pages(outbox: Path) -> None:
    """Overwrite the interior pages of the file's B-trees that are not in its log; they have no rows."""
    content = outbox.read_bytes()
    log = outbox.with_name(outbox.name + "-wal")
    frames = log.read_bytes()[32:] if log.exists() else b""
    logged = {int.from_bytes(frames[at : at + 4]) for at in range(0, len(frames), 24 + _PAGE)}
    inner = [at for at in range(0, len(content), _PAGE) if content[at] == 5 and at // _PAGE + 1 not in logged]
    assert inner
    with open(outbox, "r+b") as file:
        for at in inner:
            file.seek(at)
            file.write(b"\xff" * _PAGE)


@pytest.mark.parametrize("step", WORKER_STEPS)
@pytest.mark.parametrize(("times", "batch"), [(1, 500), (5, 6)])
def test_a_killed_worker_loses_no_event(redis: Redis, tmp_path: Path, step: str, times: int, batch: int) -> None:
    """Another worker processes its reserved jobs, whether it is killed in the only batch or in the fifth one."""
    outbox = tmp_path / "outbox.db"
    _, accepted = run_producer(tmp_path, "--seed", "8", "--count", "40")
    with started("worker", FAULT_STEP=step, FAULT_TIMES=str(times), FAULT_BATCH=str(batch)) as killed:
        killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    # Expire the leases at once: other tests check how long they last.
    for lease in redis.scan_iter(lease_key("history", "*")):
        redis.delete(lease)
    with started("worker") as successor:
        settle_the_rest(redis, [outbox], successor)
        stop_worker(successor)

    judged = judge(accepted, outbox)
    assert (judged.accepted, judged.breaches) == (40, [])

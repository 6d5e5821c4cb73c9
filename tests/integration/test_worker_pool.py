"""`trading-history worker --processes N`: what dies is started again, all end together, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from redis import Redis
from typer.testing import CliRunner

from consumers.cli import app
from consumers.operations import get_portfolio_history
from tests.deliveries import enqueue_snapshots, history_queue
from tests.rq_programs import ignoring, registered_workers, until

pytestmark = pytest.mark.usefixtures("database_url")


@contextmanager
def _pool(log: Path, processes: int, *arguments: str, **environment: str) -> Iterator[psutil.Popen]:
    command = [sys.executable, "-m", "consumers.cli", "worker", "--processes", str(processes), *arguments]
    with log.open("wb") as output:
        pool = psutil.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        yield pool
    finally:
        if pool.is_running():
            for child in pool.children():
                child.kill()
            pool.kill()
        pool.wait(10)


def test_one_that_dies_is_started_again_and_all_share_the_work(redis: Redis, tmp_path: Path) -> None:
    """Nobody starves: of a full queue each takes its part. SIGTERM ends them all, with status 0."""
    with _pool(tmp_path / "log", 2) as pool:
        until(lambda: len(registered_workers(redis)) == 2)
        victim, survivor = registered_workers(redis)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(set(registered_workers(redis)) - {victim, survivor}) == 1)
        assert "killed by signal 9" in (tmp_path / "log").read_text()
        enqueue_snapshots(redis, 3000)
        until(lambda: len(get_portfolio_history()) == 3000, 60)
        working = {pid: name for pid, name in registered_workers(redis).items() if pid != victim}
        shares = [int(redis.hget(f"rq:worker:{name}", "successful_job_count") or 0) for name in working.values()]
        assert sum(shares) == 3000
        assert min(shares) > 300
        pool.send_signal(signal.SIGTERM)
        assert pool.wait(15) == 0
        assert not any(psutil.pid_exists(pid) for pid in working)
    assert set(registered_workers(redis)) == {victim}


def test_a_pool_that_is_killed_leaves_nobody_behind(redis: Redis, tmp_path: Path) -> None:
    """Its workers notice, and end in order."""
    with _pool(tmp_path / "log", 2) as pool:
        until(lambda: len(registered_workers(redis)) == 2)
        workers = pool.children()
        pool.kill()
        pool.wait(10)
        _, alive = psutil.wait_procs(workers, 10)
    assert alive == []
    assert registered_workers(redis) == {}


def test_a_worker_that_does_not_end_is_killed_after_15_s(redis: Redis, tmp_path: Path) -> None:
    """Here at SIGHUP, as when its terminal is closed; the others end in order, and the status tells."""
    with _pool(tmp_path / "log", 2) as pool:
        until(lambda: len(registered_workers(redis)) == 2)
        stopped = next(iter(registered_workers(redis)))
        os.kill(stopped, signal.SIGSTOP)
        pool.send_signal(signal.SIGHUP)
        assert pool.wait(25) == 1
        assert not psutil.pid_exists(stopped)
    assert set(registered_workers(redis)) == {stopped}


def test_in_a_burst_they_end_with_the_queue(redis: Redis, tmp_path: Path) -> None:
    """Status 0, and nobody is started again."""
    enqueue_snapshots(redis, 1000)
    with _pool(tmp_path / "log", 2, "--burst") as pool:
        assert pool.wait(30) == 0
    assert (len(get_portfolio_history()), history_queue(redis).count) == (1000, 0)
    assert (tmp_path / "log").read_text().count("of the pool is process") == 2


def test_one_that_dies_at_once_again_and_again_is_said_loudly(redis: Redis, tmp_path: Path) -> None:
    """And tried again ever more rarely. Ctrl-C ends the pool in between, too."""
    broken = tmp_path / "broken"
    broken.mkdir()
    # The interpreter runs it first of all; only in the workers, not in the pool, it fails.
    (broken / "sitecustomize.py").write_text(
        "import sys\nif '--while-stdin' in sys.orig_argv:\n    raise SystemExit('broken')\n"
    )
    path = os.pathsep.join([str(broken), *filter(None, [os.environ.get("PYTHONPATH")])])
    with _pool(tmp_path / "log", 2, PYTHONPATH=path) as pool:
        until(
            lambda: (tmp_path / "log").read_text().count("CRITICAL consumers.embedded.worker_pool") == 2
        )  # both wait now
        pool.send_signal(signal.SIGINT)
        assert pool.wait(15) == 0
    log = (tmp_path / "log").read_text()
    assert "with exit status 1 (consecutive failure 3); next start in " in log


@pytest.mark.parametrize("number", ["0", "x"])
def test_a_wrong_number_is_wrong_usage(number: str) -> None:
    """Exit status 2."""
    command = [sys.executable, "-m", "consumers.cli", "worker", "--processes", number]
    assert subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 2


@pytest.mark.parametrize(("arguments", "port"), [(("--metrics-port", "65534"), ""), ((), "65534")])
def test_ports_that_there_are_not_are_wrong_usage(
    arguments: tuple[str, ...], port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, before any server is asked, rather than as the death of the last worker again and again."""
    monkeypatch.setenv("HISTORY_METRICS_PORT", port)
    monkeypatch.delenv("DATABASE_URL")
    run = CliRunner().invoke(app, ["worker", "--processes", "3", *arguments])
    assert run.exit_code == 2, run.output
    named = " ".join(run.stderr.replace("│", " ").split())
    assert "3 processes from 65534 on need ports above 65535" in named
    assert ("--metrics-port" if arguments else "HISTORY_METRICS_PORT") in named


@pytest.mark.parametrize("processes", [1, 2])
def test_signals_that_it_was_started_to_ignore_it_ignores(redis: Redis, tmp_path: Path, processes: int) -> None:
    """SIGHUP under nohup, SIGINT in a script's background."""
    ignored = (signal.SIGHUP, signal.SIGINT)
    with ignoring(*ignored), _pool(tmp_path / "log", processes) as pool:
        until(lambda: len(registered_workers(redis)) == processes)
        for one in (pool, *pool.children()):
            assert all(_ignores(one.pid, number) for number in ignored)
        pool.send_signal(signal.SIGTERM)
        assert pool.wait(15) == 0


def _ignores(pid: int, number: signal.Signals) -> bool:
    (mask,) = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigIgn" in line]
    return bool(int(mask, 16) >> (number - 1) & 1)

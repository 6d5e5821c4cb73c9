"""`trading-history worker --processes N`: dead workers are restarted, and all workers end with the pool."""

from __future__ import annotations

import os
import re
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
from tests.ports import first_of_free_ports
from tests.rq_programs import ignoring, registered_workers, until

pytestmark = pytest.mark.usefixtures("database_url")


@contextmanager
def _pool(
    log: Path, processes: int, *arguments: str, debug: bool = False, **environment: str
) -> Iterator[psutil.Popen]:
    program = [sys.executable, "-m", "consumers.cli", *(["--debug"] if debug else [])]
    command = [*program, "worker", "--processes", str(processes), *arguments]
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


def test_dead_worker_is_restarted_and_all_share_the_work(redis: Redis, tmp_path: Path) -> None:
    """Each worker stores a part of a long queue, and serves metrics at its own port, which it keeps. SIGTERM ends
    all of them with status 0.
    """
    first_port = first_of_free_ports(2)
    with _pool(tmp_path / "log", 2, "--metrics-port", str(first_port)) as pool:
        until(lambda: len(registered_workers(redis)) == 2)
        victim, survivor = registered_workers(redis)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(set(registered_workers(redis)) - {victim, survivor}) == 1)
        assert re.search(r"killed by signal 9 .* next start in 0\.[2-5] s", (tmp_path / "log").read_text())
        enqueue_snapshots(redis, 3000)
        until(lambda: len(get_portfolio_history()) == 3000, 60)
        working = {pid: name for pid, name in registered_workers(redis).items() if pid != victim}
        shares = [int(redis.hget(f"rq:worker:{name}", "successful_job_count") or 0) for name in working.values()]
        assert sum(shares) == 3000
        assert min(shares) > 300
        served = re.findall(r"serving metrics at http://127\.0\.0\.1:(\d+)", (tmp_path / "log").read_text())
        assert (len(served), {int(port) for port in served}) == (3, {first_port, first_port + 1})
        pool.send_signal(signal.SIGTERM)
        assert pool.wait(15) == 0
        assert not any(psutil.pid_exists(pid) for pid in working)
    assert set(registered_workers(redis)) == {victim}


def test_workers_of_a_killed_pool_end(redis: Redis, tmp_path: Path) -> None:
    """They notice it, and unregister before they end."""
    with _pool(tmp_path / "log", 2) as pool:
        until(lambda: len(registered_workers(redis)) == 2)
        workers = pool.children()
        pool.kill()
        pool.wait(10)
        _, alive = psutil.wait_procs(workers, 10)
    assert alive == []
    assert registered_workers(redis) == {}


def test_worker_that_does_not_end_is_killed_after_15_s(redis: Redis, tmp_path: Path) -> None:
    """SIGHUP comes when the terminal is closed. The other worker ends normally, and the exit status is 1."""
    with _pool(tmp_path / "log", 2) as pool:
        until(lambda: len(registered_workers(redis)) == 2)
        stopped = next(iter(registered_workers(redis)))
        os.kill(stopped, signal.SIGSTOP)
        pool.send_signal(signal.SIGHUP)
        assert pool.wait(25) == 1
        assert not psutil.pid_exists(stopped)
    assert set(registered_workers(redis)) == {stopped}


def test_burst_ends_when_the_queue_is_empty(redis: Redis, tmp_path: Path) -> None:
    """The status is 0, and no worker is restarted. With --debug the workers log each event too."""
    enqueue_snapshots(redis, 1000)
    with _pool(tmp_path / "log", 2, "--burst", debug=True) as pool:
        assert pool.wait(30) == 0
    assert (len(get_portfolio_history()), history_queue(redis).count) == (1000, 0)
    log = (tmp_path / "log").read_text()
    assert (log.count("of the pool is process"), log.count(": stored event ")) == (2, 1000)


def test_repeated_failures_at_start_are_logged_as_critical(redis: Redis, tmp_path: Path) -> None:
    """The pauses between restarts grow. Ctrl-C ends the pool during a pause."""
    broken = tmp_path / "broken"
    broken.mkdir()
    # The interpreter runs this file at its start. It fails in the workers, but not in the pool.
    (broken / "sitecustomize.py").write_text(
        "import sys\nif '--while-stdin' in sys.orig_argv:\n    raise SystemExit('broken')\n"
    )
    path = os.pathsep.join([str(broken), *filter(None, [os.environ.get("PYTHONPATH")])])
    with _pool(tmp_path / "log", 2, PYTHONPATH=path) as pool:
        until(
            lambda: (tmp_path / "log").read_text().count("CRITICAL consumers.embedded.supervisor") == 2
        )  # both workers pause now
        pool.send_signal(signal.SIGINT)
        assert pool.wait(15) == 0
    log = (tmp_path / "log").read_text()
    assert re.search(r"with exit status 1 after \d+ s \(consecutive failure 3\); next start in ", log)


@pytest.mark.parametrize("number", ["0", "x"])
def test_invalid_number_of_processes_is_wrong_usage(number: str) -> None:
    """The exit status is 2."""
    command = [sys.executable, "-m", "consumers.cli", "worker", "--processes", number]
    assert subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 2


@pytest.mark.parametrize(("arguments", "port"), [(("--metrics-port", "65534"), ""), ((), "65534")])
def test_metrics_ports_above_65535_are_wrong_usage(
    arguments: tuple[str, ...], port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command fails at once; otherwise the last worker would fail at every restart."""
    monkeypatch.setenv("HISTORY_METRICS_PORT", port)
    monkeypatch.delenv("DATABASE_URL")
    run = CliRunner().invoke(app, ["worker", "--processes", "3", *arguments])
    assert run.exit_code == 2, run.output
    named = " ".join(run.stderr.replace("│", " ").split())
    assert "3 processes from port 65534 on need ports above 65535" in named
    assert ("--metrics-port" if arguments else "HISTORY_METRICS_PORT") in named


@pytest.mark.parametrize("processes", [1, 2])
def test_signals_ignored_at_the_start_stay_ignored(redis: Redis, tmp_path: Path, processes: int) -> None:
    """nohup ignores SIGHUP, and a shell's background jobs ignore SIGINT."""
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

"""`trading-history up`: what it prints and runs, what is started again, and how everything ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil
import pytest
from redis import Redis

from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot
from tests.rq_programs import until

PROGRAM = [sys.executable, "-m", "consumers.cli"]
_RECORD = """
import os, sys
from producers.trading_controller import create_daily_portfolio_snapshot
create_daily_portfolio_snapshot({"balance": 1, "total_value": 1, "positions": []}, int(sys.argv[1]))
os._exit(0)
"""


class Up:
    """Running `trading-history up`, the lines that it printed, and its log."""

    def __init__(self, process: subprocess.Popen[str], home: Path, log: Path) -> None:
        self.process = process
        self.home = home
        self._log = log
        assert process.stdout is not None
        self.lines = []
        for line in process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith("Starting a worker and a relay"):
                break

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8")

    @property
    def page(self) -> str:
        return re.fullmatch(r"History page: (http://127\.0\.0\.1:\d+/)", self.lines[0])[1]  # type: ignore[index]

    @property
    def dashboard(self) -> tuple[str, tuple[str, str]]:
        """Address, user and password of RQ Dashboard."""
        line = re.fullmatch(r"RQ Dashboard: (http://\S+/) - user (\S+), password (\S+)", self.lines[1])
        assert line is not None
        return line[1], (line[2], line[3])

    @property
    def exports(self) -> dict[str, str]:
        lines = [line.removeprefix("export ") for line in self.lines if line.startswith("export ")]
        return {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines)}

    def child(self, command: str) -> psutil.Process:
        """Return the child process that runs this command."""
        children = psutil.Process(self.process.pid).children()
        (found,) = [one for one in children if one.is_running() and command in _command_line(one)]
        return found

    def record(self, portfolio_id: int) -> None:
        """Record an event as a controller in another shell does that ends at once."""
        environment = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}
        subprocess.run(
            [sys.executable, "-c", _RECORD, str(portfolio_id)], check=True, timeout=60, env=environment | self.exports
        )

    def stored(self) -> list[int]:
        """Return the portfolios of the stored snapshots, as the page reads them; empty while it cannot read them."""
        try:
            answer = httpx.get(f"{self.page}trading/portfolio-history?limit=1000", timeout=30)
        except httpx.HTTPError:
            return []
        return sorted(row["portfolio_id"] for row in answer.json()) if answer.status_code == 200 else []

    def signal(self, how: signal.Signals) -> int:
        """Send a signal to its process group, as a terminal does, and return the exit status."""
        os.killpg(self.process.pid, how)
        return self.process.wait(40)


@contextmanager
def _up(
    home: Path, folder: Path, *command: str, environment: Mapping[str, str] | None = None, name: str = "up"
) -> Iterator[Up]:
    """Run `up` in this working folder. Its children end with it."""
    log = folder / f"{name}.log"
    settings = {"HISTORY_HOME": str(home), "HISTORY_OUTBOX": str(folder / "outbox.db"), **(environment or {})}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*(command or PROGRAM), "up"],
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            env={**os.environ, **settings},
        )  # fmt: skip
    try:
        yield Up(process, home, log)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def home() -> Iterator[Path]:
    with TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        yield Path(folder, "home")
        until(lambda: _processes_of(Path(folder)) == [], 30)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.ZombieProcess:
        return []


def _processes_of(folder: Path) -> list[str]:
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(folder) in line]


def _pids(home: Path) -> dict[str, int]:
    files = {"PostgreSQL": home / "postgres" / "postmaster.pid", "Valkey": home / "valkey.pid"}
    return {name: int(file.read_text().split("\n", 1)[0]) for name, file in files.items()}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP])
def test_up_shows_everything_until_it_is_stopped(home: Path, tmp_path: Path, how: signal.Signals) -> None:
    """The first two lines are the addresses; the export lines are enough for a controller, even if it ends at once.

    After the signal (SIGTERM: in other tests) no process is left, and the exit status is 0.
    """
    with _up(home, tmp_path) as up:
        assert set(up.exports) == {"DATABASE_URL", "REDIS_URL", "HISTORY_OUTBOX"}
        url, login = up.dashboard
        assert httpx.get(url, timeout=30).status_code == 401
        assert httpx.get(url, auth=login, timeout=30).status_code == 200
        assert "<title>" in httpx.get(up.page, timeout=30).text
        up.record(7)
        until(lambda: up.stored() == [7])
        health = httpx.get(f"{up.page}page/health", timeout=30).json()
        assert (health["dashboard_url"], health["redis"]["workers"], health["outbox"]["pending"]) == (url, 1, 0)
        assert "ended unexpectedly" not in up.log
        assert "WARNING" not in up.log  # that there is no outbox yet is normal
        assert up.signal(how) == 0
        until(lambda: _processes_of(home) == [], 1)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


def test_what_is_killed_is_started_again_and_the_rest_recovers(home: Path, tmp_path: Path) -> None:
    """Each child and each embedded server, by kill -9. One line is logged for each."""
    with _up(home, tmp_path) as up:
        up.record(1)
        until(lambda: up.stored() == [1])
        for command in ("api", "dashboard", "worker", "relay"):
            up.child(command).kill()
        for pid in _pids(home).values():
            os.kill(pid, signal.SIGKILL)
        names = ("history page", "RQ Dashboard", "worker", "relay", "embedded PostgreSQL", "embedded Valkey")
        until(lambda: all(f" {name} ended unexpectedly" in up.log for name in names), 40)
        up.record(2)
        until(lambda: up.stored() == [1, 2], 60)
        url, login = up.dashboard
        until(lambda: httpx.get(f"{url}0/data/queues.json", auth=login, timeout=30).status_code == 200)
        lines = [line for line in up.log.splitlines() if "ended unexpectedly" in line]
        assert [sum(f" {name} ended" in line for line in lines) for name in names] == [1] * len(names), lines
        # The servers may run for longer than this process.
        assert [" after " in line for line in lines] == [" embedded " not in line for line in lines]
        assert up.signal(signal.SIGTERM) == 0


def test_a_server_that_cannot_be_started_is_tried_again_after_growing_pauses(home: Path, tmp_path: Path) -> None:
    """As soon as its files are right, everything continues. From the third failure on the line is critical."""
    with _up(home, tmp_path) as up:
        manifest = next((home / "valkey").rglob("*.manifest"))
        content = manifest.read_text()
        manifest.write_text("not a manifest\n")
        os.kill(_pids(home)["Valkey"], signal.SIGKILL)
        until(lambda: "CRITICAL" in up.log, 40)
        failures = [line for line in up.log.splitlines() if "embedded Valkey ended unexpectedly" in line]
        pauses = [float(re.search(r"next start in ([\d.]+) s", line)[1]) for line in failures]  # type: ignore[index]
        assert pauses[0] <= 0.5
        assert pauses[2] >= 1
        assert "Valkey did not start" in failures[1]
        manifest.write_text(content)
        until(lambda: "embedded Valkey runs again" in up.log, 40)
        up.record(1)
        until(lambda: up.stored() == [1], 40)
        assert up.signal(signal.SIGTERM) == 0


def test_kill_9_of_up_ends_everything(home: Path, tmp_path: Path) -> None:
    """Its children notice it; the last one stops the embedded servers, and nothing is lost."""
    with _up(home, tmp_path) as up:
        up.record(1)
        until(lambda: up.stored() == [1])
        children = psutil.Process(up.process.pid).children()
        assert len(children) == 4
        up.process.kill()
        _, alive = psutil.wait_procs(children, 20)
        assert alive == []
        until(lambda: _processes_of(home) == [], 20)
        assert "database system is shut down" in (home / "postgres.log").read_text()
    with _up(home, tmp_path) as again:
        until(lambda: again.stored() == [1])


def test_two_at_once_share_the_servers_and_the_outbox(home: Path, tmp_path: Path) -> None:
    """The second one listens at other ports and says so in one line each. It continues when the first one stops."""
    with _up(home, tmp_path) as first, _up(home, tmp_path, name="second") as second:
        said = [line for line in second.log.splitlines() if "uses another port this time" in line]
        assert [line.partition(" uses")[0] for line in said] == ["RQ Dashboard", "The history page"]
        assert (first.page != second.page, first.exports == second.exports) == (True, True)
        servers = _pids(home)
        first.record(1)
        until(lambda: first.stored() == second.stored() == [1])
        assert first.signal(signal.SIGTERM) == 0
        second.record(2)
        until(lambda: second.stored() == [1, 2])
        assert _pids(home) == servers
        assert "ended unexpectedly" not in first.log + second.log
        assert second.signal(signal.SIGTERM) == 0


@pytest.mark.parametrize("place", ["beside", "in its data"])
def test_a_demo_runs_beside_up(home: Path, tmp_path: Path, place: str) -> None:
    """The demo has its own servers. If `up` runs on the demo's data, both share them, and the counts are right."""
    with _up(home if place == "beside" else home / "demo", tmp_path) as up:
        if place == "beside":
            up.record(1)
            until(lambda: up.stored() == [1])
        demo = subprocess.run(
            [*PROGRAM, "demo"], capture_output=True, text=True, timeout=100, check=False,
            env={**os.environ, "HISTORY_HOME": str(home)},
        )  # fmt: skip
        assert (demo.returncode, "All counts are right" in demo.stdout) == (0, True), demo.stderr
        if place == "beside":
            assert up.stored() == [1]
        else:
            assert len(up.stored()) == 182
            up.record(3)
            until(lambda: 3 in up.stored())
        assert "ended unexpectedly" not in up.log
        assert up.signal(signal.SIGTERM) == 0


def _without(*modules: str) -> list[str]:
    """Return the program on a Python that finds none of these modules, as in an installation without their extra."""
    code = f"import sys; sys.modules.update(dict.fromkeys({modules})); from consumers.cli import main; main()"
    return [sys.executable, "-c", code]


def test_without_the_extras_of_the_web_servers_the_rest_runs(home: Path, tmp_path: Path) -> None:
    """The lines of the addresses say what to install."""
    with _up(home, tmp_path, *_without("uvicorn", "rq_dashboard")) as up:
        assert up.lines[:2] == [
            "The history page is not installed: run pip install '.[api]' in a clone of trading-history",
            "RQ Dashboard is not installed: run pip install '.[dashboard]' in a clone of trading-history",
        ]
        with HistoryProducer(Redis.from_url(up.exports["REDIS_URL"]), outbox=tmp_path / "outbox.db") as producer:
            assert producer.record(a_snapshot()).wait(30) == 1
        assert len(psutil.Process(up.process.pid).children()) == 2
        assert up.signal(signal.SIGINT) == 0


def _failed(*program: str, **environment: str) -> str:
    """Run `up`, which must fail before it prints or starts anything, and return its error.

    A line about a port that another program uses may come first.
    """
    run = subprocess.run(
        [*(program or PROGRAM), "up"], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (1, "")
    return "".join(line for line in run.stderr.splitlines(keepends=True) if " uses another port " not in line)


def test_without_the_extra_of_the_worker_it_names_it(redis: Redis, database_url: str) -> None:
    error = _failed(*_without("sqlalchemy"))
    assert error == (
        "error: this command needs the extra [worker]: run pip install '.[worker]' in a clone of trading-history\n"
    )


def test_an_outbox_of_another_redis_is_an_error_at_once(redis: Redis, database_url: str, tmp_path: Path) -> None:
    """Its relay would fail again and again. The line says what to set."""
    outbox = tmp_path / "outbox.db"
    with HistoryProducer(Redis(port=1), outbox=outbox) as producer:
        producer.record(a_snapshot())
    error = _failed(HISTORY_OUTBOX=str(outbox))
    assert error.startswith(
        f"error: outbox {outbox}: its entries go to database 0 on localhost, port 1, queue history,"
    )
    assert error.endswith("or HISTORY_OUTBOX to another file\n")


@pytest.mark.parametrize("setting", ["HISTORY_DASHBOARD_URL", "HISTORY_API_ROOT_PATH", "HISTORY_METRICS_PORT"])
def test_a_wrong_setting_is_an_error_at_once(redis: Redis, database_url: str, setting: str) -> None:
    """And not the failure of a child that is started again and again."""
    assert re.fullmatch(f"error: {setting}: .*\n", _failed(**{setting: "wrong!"}))


def test_with_servers_of_the_settings_nothing_secret_is_printed(
    redis: Redis, database_url: str, home: Path, tmp_path: Path
) -> None:
    """The password of RQ Dashboard is the one of the setting. A taken port of the metrics is replaced."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = {
            "HISTORY_DASHBOARD_PASSWORD": "a-s3cret",
            "HISTORY_API_TOKEN": "another-s3cret",
            "HISTORY_QUEUE": "other",
            "HISTORY_METRICS_PORT": str(taken.getsockname()[1]),
        }
        with _up(home, tmp_path, environment=settings) as up:
            assert up.lines[0].endswith("/ - token HISTORY_API_TOKEN")
            url, (_, password) = up.dashboard
            assert password == "HISTORY_DASHBOARD_PASSWORD"
            assert up.exports == {"HISTORY_QUEUE": "other", "HISTORY_OUTBOX": str(tmp_path / "outbox.db")}
            assert "For a controller in another shell, besides REDIS_URL:" in up.lines
            assert httpx.get(url, auth=("history", "a-s3cret"), timeout=30).status_code == 200
            with HistoryProducer(redis, queue="other", outbox=tmp_path / "outbox.db") as producer:
                assert producer.record(a_snapshot()).wait(30) == 1
            until(lambda: "serving metrics at http://127.0.0.1:" in up.log)
            assert up.log.count("The metrics server uses another port this time: cannot listen at 127.0.0.1 port ") == 1
            assert "s3cret" not in up.log + "\n".join(up.lines)
            assert up.signal(signal.SIGTERM) == 0
    assert not home.exists()

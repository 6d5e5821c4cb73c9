"""README.md shows what happens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
from redis import Redis
from typer.testing import CliRunner

from consumers.cli import app
from producers.trading_controller import shared_producer
from tests.documents import ROOT, block, text_of, words

PROGRAM = Path(sys.executable).with_name("trading-history")


def _comparable(transcript: str, home: str) -> list[str]:
    """Replace everything that differs between runs: durations, rates, versions, folders, and row numbers."""
    text = transcript.replace(home, "HOME").replace(str(PROGRAM), ".venv/bin/trading-history")
    text = re.sub(r"PostgreSQL \d+(\.\d+)*, Valkey \d+(\.\d+)*", "PostgreSQL x, Valkey x", text)
    text = re.sub(r"\d+\.\d\d s", "T s", text)
    text = re.sub(r"^ *\d+ +(?=\d  )", "N ", text, flags=re.M)
    return re.sub(r"[\d,]+ events/s", "N events/s", text).splitlines()


@pytest.fixture
def home() -> Iterator[Path]:
    with TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        yield Path(folder)


def test_the_demo_prints_the_transcript_and_leaves_no_process(home: Path) -> None:
    """A line `[…]` stands for lines that README.md leaves out. The second run replaces the data of the first."""
    environment = {**os.environ, "HISTORY_HOME": str(home), "PYTHONWARNINGS": "error"}
    shown = block("README.md", "transcript of the demo")
    parts = [_comparable(part, "/home/me/.local/share/trading-history/demo") for part in shown.split("[…]\n")]
    for _ in range(2):
        demo = subprocess.run(
            [PROGRAM, "demo"], capture_output=True, text=True, timeout=60, env=environment, check=False
        )
        assert demo.returncode == 0, demo.stderr
        printed = _comparable(demo.stdout, f"{home}/demo")
        assert printed[: len(parts[0])] == parts[0]
        assert printed[-len(parts[-1]) :] == parts[-1]
        for part in parts[1:-1]:
            assert "\n".join(part) in "\n".join(printed)
        left = [process for process in psutil.process_iter(["cmdline"]) if str(home) in str(process.info["cmdline"])]
        assert left == []


def test_the_last_lines_of_the_demo_can_be_run_without_the_installed_program(home: Path) -> None:
    """It then runs as a module."""
    program = [sys.executable, "-m", "consumers.cli"]
    environment = {**os.environ, "HISTORY_HOME": str(home)}
    demo = subprocess.run([*program, "demo"], capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert demo.returncode == 0, demo.stderr
    assert f"  {shlex.join(program)} up\n" in demo.stdout
    assert f"demo {shlex.join(program)} history --portfolio-id 1\n" in demo.stdout


def test_the_command_of_the_demo_installs_an_extra_that_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (extra,) = re.findall(r"'\.\[(\w+)\]'", block("README.md", "demo"))
    assert extra in project["optional-dependencies"]
    assert block("README.md", "demo").endswith(".venv/bin/trading-history demo\n")


def test_the_gate_runs_the_line_that_sets_up_and_tests_the_project() -> None:
    """`.ci/run` takes the line from README.md with this pattern of sed."""
    line = block("README.md", "tests").rstrip("\n")
    assert r"s/^\(python3 -m venv .*pytest\)$/\1/p" in (ROOT / ".ci/run").read_text("utf-8")
    assert re.findall(r"^(python3 -m venv .*pytest)$", text_of("README.md"), re.M) == [line]


def test_the_example_of_a_controller_records_two_events(redis: Redis, database_url: str) -> None:
    exec(block("README.md", "controller"), {})
    shared_producer().close()
    assert len(redis.lrange("rq:queue:history", 0, -1)) == 2


def test_a_repeated_cycle_of_the_example_is_stored_once_and_history_shows_the_row(
    redis: Redis, database_url: str, work: Callable[[], None]
) -> None:
    """Both calls get the cycle's own time."""
    namespace: dict[str, Any] = {}
    exec(block("README.md", "controller"), namespace)
    cycle_time = namespace["datetime"].now(namespace["timezone"].utc)
    for _ in range(2):
        namespace["record_cycle"]({"balance": 20, "total_value": "10197.38"}, [{"market_id": "1"}], cycle_time)
    shared_producer().close()
    assert len(redis.lrange("rq:queue:history", 0, -1)) == 6
    work()
    history, archives = (CliRunner().invoke(app, [command]).stdout for command in ("history", "archives"))
    assert (history.count("10,197.37"), history.count("10,197.38")) == (1, 1)
    assert len(re.findall("^ *[12] ", archives, re.M)) == 2


def test_the_example_of_a_controller_survives_bad_input(
    redis: Redis, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    namespace: dict[str, Any] = {}
    exec(block("README.md", "controller"), namespace)
    namespace["record_cycle"]({"ballance": 1}, [], namespace["datetime"].now(namespace["timezone"].utc))
    shared_producer().close()
    assert "InvalidEvent: " in caplog.text


def test_the_readme_is_short() -> None:
    assert words(text_of("README.md")) <= 950

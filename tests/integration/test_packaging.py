"""The distribution: what the wheel carries, and what a controller's installation brings along."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("trading_history-*.whl")
    return built


def test_the_wheel_carries_the_schema_the_demo_and_the_page_and_no_tests(wheel: Path) -> None:
    """And nothing at its top but the two packages and the metadata."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"consumers", "producers"}
    assert {"consumers/schema.sql", "consumers/demo/portfolio.json", "consumers/demo/current_signals.json"} <= set(
        names
    )
    static = {f"consumers/web/page/static/{path.name}" for path in (ROOT / "consumers/web/page/static").iterdir()}
    assert static
    assert static <= set(names)


def test_a_controllers_installation_has_no_database_library(wheel: Path, tmp_path: Path) -> None:
    """producers imports there, the command answers, and what needs a database says which extra has it."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True, capture_output=True)
    installed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout.lower()
    imports = "import producers.trading_controller, producers.history_producer, sys; print(*sys.modules)"
    modules = subprocess.run([python, "-c", imports], check=True, capture_output=True, text=True).stdout.split()
    command = subprocess.run(
        [tmp_path / "venv" / "bin" / "trading-history", "history"],
        capture_output=True,
        text=True,
        check=False,
        env={"DATABASE_URL": "postgresql://h/d", "REDIS_URL": "redis://h"},
    )

    assert not {"sqlalchemy", "psycopg2-binary"} & set(installed.split())
    assert {"rq", "redis", "pydantic"} <= set(installed.split())
    assert not {"consumers", "fakeredis", "httpx", "pytest", "sqlalchemy"} & set(modules)
    assert (command.returncode, command.stderr) == (
        1,
        "error: this command needs more: pip install '.[worker]' in a clone of trading-history\n",
    )
    unset = subprocess.run(
        [tmp_path / "venv" / "bin" / "trading-history", "archive"], capture_output=True, text=True, check=False, env={}
    )
    assert (unset.returncode, unset.stderr.split(":")[1]) == (1, " neither DATABASE_URL nor REDIS_URL is set")

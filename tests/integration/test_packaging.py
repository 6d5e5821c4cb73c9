"""The wheel and its contents, and the packages of a controller's installation."""

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


def test_wheel_has_the_packages_and_their_data_files_and_no_tests(wheel: Path) -> None:
    """At its top are only the two packages, the pytest plugin and the metadata."""
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".png")] == []  # the pictures of the documents
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "consumers",
        "producers",
        "trading_history_pytest.py",
    }
    assert {"consumers/schema.sql", "consumers/demo/portfolio.json", "consumers/demo/current_signals.json"} <= set(
        names
    )
    for folder in ("consumers/web/page/static", "consumers/deploy"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert files
        assert files <= set(names)


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a virtual environment with a controller's installation."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", "-q", str(wheel)], check=True, capture_output=True
    )
    return folder / "bin"


def test_controllers_installation_has_no_database_driver(bin_folder: Path) -> None:
    """`producers` can be imported. A command that needs a database names the extra to install."""
    python = bin_folder / "python"
    installed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout.lower()
    imports = "import producers.trading_controller, producers.history_producer, sys; print(*sys.modules)"
    modules = subprocess.run([python, "-c", imports], check=True, capture_output=True, text=True).stdout.split()
    command = subprocess.run(
        [bin_folder / "trading-history", "history"],
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
        "error: this command needs the extra [worker]: run pip install '.[worker]' in a clone of trading-history\n",
    )
    unset = subprocess.run(
        [bin_folder / "trading-history", "archive"], capture_output=True, text=True, check=False, env={}
    )
    assert (unset.returncode, unset.stderr.split(":")[1]) == (1, " neither DATABASE_URL nor REDIS_URL is set")


def _run(folder: Path, *command: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, "-p", "no:cacheprovider"], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("installation", ["wheel", "editable"])
def test_project_with_its_own_producers_package_runs_its_tests(
    bin_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, installation: str
) -> None:
    """Every run of pytest loads our plugin. If `producers` is another package, only our fixture fails, in one line."""
    if installation == "editable":
        venv.create(folder := tmp_path_factory.mktemp("editable"), with_pip=True)
        python = folder / "bin" / "python"
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-deps", "-e", str(ROOT)], check=True, capture_output=True
        )
    else:
        python = bin_folder / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "pytest"], check=True, capture_output=True)
    for name in ("producers", "consumers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("", "utf-8")
    (tmp_path / "test_own.py").write_text(
        "import consumers, producers\ndef test_own(): pass\ndef test_fixture(trading_history): pass\n", "utf-8"
    )
    run = _run(tmp_path, python, "-m", "pytest", "-q")
    assert "1 passed, 1 error" in run.stdout, run.stdout + run.stderr
    assert f"({tmp_path}/producers/__init__.py) hides the one of trading-history: move the tests" in run.stdout
    assert "another exception" not in run.stdout
    (tmp_path / "tests").mkdir()
    (tmp_path / "test_own.py").write_text("import consumers, producers\ndef test_own(): pass\n", "utf-8")
    (tmp_path / "tests" / "test_moved.py").write_text("def test_fixture(trading_history): pass\n", "utf-8")
    assert "hides the one" in _run(tmp_path, python, "-m", "pytest", "-q", "tests").stdout
    advised = _run(tmp_path, python.parent / "pytest", "-q", "tests").stdout
    # Our package is found. What the fixture needs is not installed here.
    assert ("hides" in advised, "No module named 'fakeredis'" in advised) == (False, True), advised

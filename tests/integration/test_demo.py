"""The demo if something is wrong: no worker, wrong counts, or another demo in the same folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from consumers import demo
from consumers.demo import run_demo
from consumers.demo.cycle import cycles
from consumers.embedded import servers
from producers.errors import HistoryError


@pytest.fixture
def home() -> Iterator[Path]:
    """Folder with running servers, so that each demo in it need not start them."""
    with TemporaryDirectory(prefix="th-", dir="/tmp") as folder, servers(Path(folder)):
        yield Path(folder)


def test_a_demo_that_fails_says_why_and_leaves_the_settings_as_they_are(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its servers are its own, whatever the settings name. It shows the page only if all counts are right."""
    monkeypatch.setattr(demo, "cycles", lambda: islice(cycles(), 1))
    elsewhere = {"DATABASE_URL": "postgresql://h.example/x", "REDIS_URL": "redis://h.example"}
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    shown: list[Path] = []

    with pytest.raises(
        HistoryError, match=r"^event .* was not acknowledged .*; see the worker's log in the demo's folder$"
    ):
        run_demo(home, shown.append, wait_seconds=0)
    capsys.readouterr()
    assert run_demo(home, shown.append) == 1
    printed = capsys.readouterr()
    assert "2 rows: 1 snapshots, 1 archives\n2 duplicates, 0 rejected events\n" in printed.out
    assert printed.err.endswith("Wrong count: 364 rows and 364 duplicates were expected.\n")
    assert {name: os.environ[name] for name in elsewhere} == elsewhere
    assert shown == []


def test_a_second_demo_in_a_folder_waits_and_then_fails(tmp_path: Path) -> None:
    """It starts nothing."""
    with (tmp_path / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HistoryError, match=f"^another demo is running in {tmp_path}: wait until it ends$"):
            run_demo(tmp_path, lock_seconds=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.lock"]

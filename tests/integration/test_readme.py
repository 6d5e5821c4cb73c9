"""What the README shows is what happens."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from redis import Redis

from consumers.db.engine import get_db
from consumers.settings import (
    ApiSettings,
    DashboardSettings,
    EmbeddedSettings,
    LoginSettings,
    LogSettings,
    MetricsSettings,
    StoreSettings,
)
from producers.events import PortfolioSnapshotEvent, decode, encode, event_id
from producers.outbox import Outbox
from producers.settings import TransportSettings
from producers.trading_controller import shared_producer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def _block(marker: str) -> str:
    """The fenced block after an HTML comment."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found.group(1)


PROGRAM = Path(sys.executable).with_name("trading-history")


def _comparable(transcript: str, home: str) -> list[str]:
    """Without what differs between runs: durations and rates, versions, the folders, row numbers of two threads."""
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
    """Twice: the second run replaces what the first left."""
    environment = {**os.environ, "HISTORY_HOME": str(home), "PYTHONWARNINGS": "error"}
    expected = _comparable(_block("transcript: trading-history demo"), "/home/me/.local/share/trading-history/demo")
    for _ in range(2):
        demo = subprocess.run(
            [PROGRAM, "demo"],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
            check=False,
        )
        assert (demo.returncode, _comparable(demo.stdout, f"{home}/demo")) == (0, expected), demo.stderr
        left = [process for process in psutil.process_iter(["cmdline"]) if str(home) in str(process.info["cmdline"])]
        assert left == []


def test_nothing_in_it_waits_to_be_filled_in() -> None:
    """No section is empty, and the figures are there."""
    sections = re.split(r"^#{2,3} ", README, flags=re.M)[1:]
    assert [section.split("\n")[0] for section in sections if len(section.split("\n", 1)[1].strip()) < 40] == []
    assert re.search(r"create_daily_portfolio_snapshot +\d+\.\d\d +\d+\.\d\d", README)


def test_the_python_examples_run(
    redis: Redis, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks, in order, in one namespace: two facts from the shared producer, two from one of its own."""
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, namespace)
    shared_producer().close()

    entries = redis.lrange("rq:queue:history", 0, -1)
    assert (len(entries), Outbox(tmp_path / "data" / "outbox.db").status().sent) == (4, 4)


def test_the_tests_of_a_controller_run(tmp_path: Path) -> None:
    """As somebody else would run them: the fixture is there because the package is installed."""
    (tmp_path / "test_bot.py").write_text(_block("test_bot.py"), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (run.returncode, "2 passed" in run.stdout) == (0, True), run.stdout


def test_the_sql_examples_run(database_url: str) -> None:
    """Each statement, on the tables as schema.sql makes them."""
    (block,) = re.findall(r"```sql\n(.*?)```", README, re.DOTALL)
    statements = [statement for statement in block.split(";") if statement.strip()]
    with get_db() as db:
        results = [db.exec_driver_sql(statement).all() for statement in statements]
    assert results == [[], [], []]


def test_the_wire_example_is_an_event_of_ours() -> None:
    """It decodes, and encodes to the same text."""
    text = _block("wire").strip()
    assert encode(decode(text, PortfolioSnapshotEvent)) == text


def test_the_test_vectors_are_right() -> None:
    """Every row of the table of ids."""
    rows = re.findall(r"\| `(trading\.[\w.-]+)` \| (\d*) ?\| `([^`]+)` \| `([0-9a-f-]{36})` \|", README)
    assert len(rows) == 4
    for event_type, portfolio, instant, expected in rows:
        portfolio_id = int(portfolio) if portfolio else None
        assert str(event_id(event_type, portfolio_id, datetime.fromisoformat(instant))) == expected


def test_every_setting_is_documented_and_every_documented_setting_exists() -> None:
    """The table of settings against the models that read them."""
    section = README.split("### Settings")[1].split("\n## ")[0]
    documented = set()
    for cell in re.findall(r"^\| (`.*?) \|", section, re.M):
        names = re.findall("`([^`]+)`", cell)
        documented |= {name if not name.startswith("_") else names[0].rsplit("_", 1)[0] + name for name in names}
    models = (
        *(TransportSettings, StoreSettings, LoginSettings, EmbeddedSettings, ApiSettings, DashboardSettings),
        *(MetricsSettings, LogSettings),
    )
    assert documented == {field.alias for model in models for field in model.model_fields.values()}


def test_the_schema_command_prints_json_schema() -> None:
    """On a host without database drivers too: it needs none of them."""
    printed = subprocess.run(
        [sys.executable, "-m", "consumers.cli", "schema"], capture_output=True, text=True, check=True, timeout=30
    )
    assert set(json.loads(printed.stdout)["$defs"]) == {
        "PortfolioSnapshot",
        "PortfolioSnapshotEvent",
        "SignalArchive",
        "SignalArchiveEvent",
    }

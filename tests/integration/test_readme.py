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
from typing import Any

import psutil
import pytest
import yaml
from redis import Redis
from typer.main import get_command

from consumers.cli import app
from consumers.operations import insert_portfolio_history_snapshot
from consumers.ops.exposition import worker_registry
from consumers.ops.queue_health import read_queue
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
DEPLOY = ROOT / "consumers" / "deploy"


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


def _own_options(command: Any) -> set[str]:
    return {name for one in command.params for name in one.opts if name.startswith("--")} | {"--help"}


def _commands() -> dict[str, set[str]]:
    """The options of each command; those of a group go by both words, as in `outbox status`."""
    found: dict[str, set[str]] = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]  # a click group
        parts = getattr(command, "commands", None)
        found |= {name: command} if parts is None else {f"{name} {part}": one for part, one in parts.items()}
    return {name: _own_options(command) for name, command in found.items()}


def _unknown(line: str, commands: dict[str, set[str]]) -> list[str]:
    """What a command line, without its program, names and the command has not; all of it if it is none of ours."""
    words = line.split()
    name = next((name for name in commands if words[: len(name.split())] == name.split()), None)
    named = re.findall(r"(?<!\S)--[\w-]+", line)
    return [line] if name is None else [f"{name} {option}" for option in named if option not in commands[name]]


def test_every_command_is_documented_and_every_documented_command_exists() -> None:
    """The table of commands against the command itself: subcommands, and the options that a row names."""
    section = README.split("### Commands")[1].split("### Settings")[0]
    commands, documented, unknown = _commands(), set(), []
    for cell, does in re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.M):
        for line in re.findall("`([^`]+)`", cell):
            documented |= {name for name in commands if f"{line} ".startswith(f"{name} ")}
            unknown += _unknown(" ".join([line, *re.findall("`(--[^`]+)`", does)]), commands)
    assert unknown == []
    assert documented == set(commands)


def test_every_command_line_in_it_exists() -> None:
    """In code blocks, and in a line of text with the program's name or without; so do the options that it names.

    In README.md of consumers/deploy too, and in the summaries of the alerts.
    """
    pages = README + (DEPLOY / "README.md").read_text("utf-8")
    alerts = (DEPLOY / "alerts.yaml").read_text("utf-8")
    commands, top = _commands(), _own_options(get_command(app))
    groups = {name.split()[0] for name in commands}
    blocks = re.findall(r"```\w+\n(.*?)```", pages, re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall("`([^`]+)`", re.sub(r"```.*?```", "", pages, flags=re.S))]
    lines = [line for block in [*blocks, alerts] for line in block.replace("\\\n", "").splitlines()] + spans
    called = [line for text in lines for line in re.findall(r"trading-history ([^;|&\"}]+)", text)]
    called += [span for span in spans if span.split()[0] in groups and len(span.split()) > 1]
    assert len(called) > 50
    unknown = [one for line in called if line[0] not in "-…" for one in _unknown(line.rstrip(" .…"), commands)]
    assert unknown == []
    assert {line.split()[0] for line in called if line[0] == "-"} <= top


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


def test_the_metrics_of_the_table_and_of_the_alerts_exist_and_none_is_missing(redis: Redis, database_url: str) -> None:
    """With an outbox, a portfolio and labels as they are; the rules as Prometheus reads their file."""
    row = dict.fromkeys(("balance", "total_invested", "total_profit_loss", "total_value"), 1)
    counts = {"open_positions": 1, "trade_count": 1, "portfolio_id": 1}
    insert_portfolio_history_snapshot({"timestamp": datetime(2026, 11, 22), **row, **counts})
    Path("data").mkdir()
    Outbox("data/outbox.db").close()
    families = {
        family.name: {name for sample in family.samples for name in sample.labels}
        for family in worker_registry(lambda: None, lambda: read_queue(redis, "history")).collect()
        if family.name.startswith("trading_history_")
    }

    section = README.split("## Watch it")[1].split("\n## ")[0]
    cells = " ".join(re.findall(r"^\| (`.*?`) \|", section, re.M))
    documented = re.findall(r"`(\w+?)(?:_total)?(?:\{([\w,]+)\})?`", cells)
    assert {f"trading_history_{name}": set(labels.split(",")) - {""} for name, labels in documented} == {
        name: labels - {"le"} for name, labels in families.items()
    }

    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text("utf-8"))["groups"]
    assert all({"alert", "expr", "annotations"} <= set(rule) <= {"alert", "expr", "annotations", "for"}
               for rule in group["rules"])  # fmt: skip
    used = set(re.findall(r"trading_history_\w+", " ".join(rule["expr"] for rule in group["rules"])))
    assert {re.sub("_(total|bucket)$", "", name) for name in used} - {"trading_history_"} <= set(families)


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

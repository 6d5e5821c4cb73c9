"""producers/OUTBOX.md: its commands run, and its tables and limits are those of the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import get_args

import pytest
from redis import Redis
from typer.main import get_command

from consumers.cli import app
from producers import acknowledgements, entry_sender, outbox, outbox_header, outbox_quarantine
from producers.entries import State
from producers.outbox import Outbox
from producers.outbox_place import DAMAGED, LOCK, TAKEN_OUT
from tests.documents import block, table, text_of
from tests.factories import a_snapshot
from tests.relaying import COMMAND, ROOT, a_relay, a_worker, states
from tests.rq_programs import until

DOCUMENT = "producers/OUTBOX.md"


@pytest.fixture(autouse=True)
def bot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a controller runs in, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def _append(path: Path, count: int = 1) -> None:
    with Outbox(path) as opened:
        opened.append("bot", [a_snapshot(after=timedelta(number)) for number in range(count)])


def _names(marker: str) -> list[str]:
    """The code spans in the first column of a table."""
    return [name for row in table(DOCUMENT, marker) for name in re.findall("`([^`]+)`", row[0])]


def test_outbox_status_prints_the_documented_fields(bot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the documented order; the values of an outbox with one event have the documented types."""
    monkeypatch.delenv("REDIS_URL", raising=False)
    _append(bot / "data" / "outbox.db")
    run = subprocess.run([*COMMAND, "outbox", "status", "--json"], capture_output=True, text=True, check=True)
    printed, documented = json.loads(run.stdout), json.loads(block("producers/OUTBOX.md", "outbox status --json"))
    assert [(name, type(value)) for name, value in printed.items()] == [
        (name, type(value)) for name, value in documented.items()
    ]


def test_the_documented_command_deletes_a_settled_outbox(redis: Redis, database_url: str, bot: Path) -> None:
    """It deletes nothing while an event is not settled."""
    _append(bot / "data" / "outbox.db", 2)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = block("producers/OUTBOX.md", "delete")

    def run(shell: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", "-c", shell], capture_output=True, text=True, env=environment, check=False)

    refused = run(command.replace("flush", "flush --timeout 0.5"))
    assert (refused.returncode, states(bot / "data" / "outbox.db")) == (1, {"sent": 2}), refused.stderr
    with a_worker(redis, bot / "worker.log"):
        deleted = run(command)
    assert (deleted.returncode, list((bot / "data").iterdir())) == (0, []), deleted.stderr


def test_the_documented_relay_command_relays_both_outboxes(redis: Redis, bot: Path) -> None:
    """With paths below the test's folder instead of /srv."""
    arguments = block("producers/OUTBOX.md", "relay").replace("/srv", str(bot)).split()
    assert arguments[:2] == ["trading-history", "relay"]
    files = [bot / name / "outbox.db" for name in ("bot-1", "bot-2")]
    for file in files:
        _append(file)
    with a_relay(bot / "log", *arguments[2:]):
        until(lambda: [states(file) for file in files] == [{"sent": 1}] * 2)


def test_the_documented_commands_and_options_exist() -> None:
    """All commands of the group `outbox` are documented."""
    group = get_command(app).commands["outbox"]  # type: ignore[attr-defined]  # a click group
    documented = {}
    for command, does in table(DOCUMENT, "commands"):
        _, name, *_ = command.strip("`").split()
        documented[name] = set(re.findall(r"--[\w-]+", command + does))
    assert set(documented) == set(group.commands)
    for name, options in documented.items():
        assert options <= {option for one in group.commands[name].params for option in one.opts}


def test_the_documented_states_are_those_of_an_entry() -> None:
    """In the order in which an entry gets them."""
    assert tuple(_names("states")) == get_args(State)


def test_the_documented_files_have_the_names_that_the_code_gives_them() -> None:
    """SQLite's files and those of the outbox."""
    assert {name.removeprefix("outbox.db").rstrip("…") for name in _names("files")} == {
        *("", "-wal", "-shm", "-pair", LOCK, TAKEN_OUT, DAMAGED, outbox_quarantine._SALVAGED)
    }


def test_the_documented_tables_are_those_of_the_file(bot: Path) -> None:
    """The row of the file itself names them."""
    with Outbox(bot / "outbox.db") as opened, opened._file.reading() as db:
        tables = {
            name
            for (name,) in db.execute(
                "SELECT name FROM sqlite_schema WHERE sql IS NOT NULL AND type != 'index' AND name NOT LIKE 'sqlite%'"
            )
        }
    ((_, content),) = [row for row in table(DOCUMENT, "files") if row[0] == "`outbox.db`"]
    assert set(re.findall("`([^`]+)`", content)) == tables


def test_the_documented_limits_are_those_of_the_code() -> None:
    """Each is written once in the text, with its unit."""
    text = " ".join(text_of(DOCUMENT).split())
    for limit in (
        f"after about {entry_sender._FIRST_CHECK_SECONDS:.0f} s",
        f"up to every {entry_sender._LAST_CHECK_SECONDS / 60:.0f} minutes",
        f"take over {outbox_header.RELAY_ALIVE_SECONDS:.0f} s after the last one",
        f"While {entry_sender._FULL_QUEUE_JOBS:,} jobs are queued",
        f"kept for {acknowledgements.ACKNOWLEDGEMENT_TTL_SECONDS / 86400:.0f} days",
        f"**Full** ({outbox.MAX_BYTES / 2**30:.0f} GiB",
    ):
        assert text.count(limit) == 1, limit

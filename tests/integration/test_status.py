"""`status`: each part by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

from consumers.status import pipeline_status

_PROGRAM = [sys.executable, "-m", "consumers.cli", "status"]


def _spoil(outbox: Path, how: str) -> Path:
    if how == "no database":
        outbox.write_text("nonsense" * 1000)
    elif how == "of a newer release":
        import sqlite3

        with sqlite3.connect(outbox) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
    else:
        outbox = outbox.with_name("x" * 300)
    return outbox


@pytest.mark.parametrize("how", ["no database", "of a newer release", "a name too long"])
def test_an_unreadable_outbox_is_told_beside_all_else(
    redis: Redis, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What the database and the queue hold is shown all the same; exit status 1, and --watch goes on."""
    outbox = _spoil(tmp_path / "outbox.db", how)
    monkeypatch.setenv("HISTORY_OUTBOX", str(outbox))
    facts, healthy = pipeline_status()
    assert facts["outbox"].startswith(("outbox ", str(outbox)))
    assert str(outbox) in facts["outbox"]
    assert (facts["database"], facts["redis"], facts["queued"], healthy) == ("reachable", "reachable", 0, False)

    once = subprocess.run([*_PROGRAM, "--json"], capture_output=True, text=True, timeout=60, check=False)
    assert (once.returncode, once.stderr, json.loads(once.stdout)["outbox"]) == (1, "", facts["outbox"])
    if how == "no database":
        with subprocess.Popen([*_PROGRAM, "--watch", "--json"], stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            lines = [json.loads(watching.stdout.readline()) for _ in range(2)]
            watching.kill()
        assert [line["outbox"] for line in lines] == 2 * [facts["outbox"]]

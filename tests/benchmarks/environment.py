"""Temporary servers for each benchmark, and facts about the machine."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rq
from redis import Redis
from sqlalchemy import text

from consumers.db.engine import engine
from consumers.embedded.stack import embedded_stack
from producers.settings import TransportSettings


@contextmanager
def bench_stack(*, commit_times: bool = False) -> Iterator[Path]:
    """Run PostgreSQL and Valkey with their default durability in a temporary folder, and yield the folder.

    With `commit_times`, PostgreSQL keeps the time of each commit.
    """
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        if commit_times:  # which takes a restart
            with embedded_stack(Path(folder)), engine().connect() as db:
                db.execution_options(isolation_level="AUTOCOMMIT").execute(
                    text("ALTER SYSTEM SET track_commit_timestamp = on")
                )
        with embedded_stack(Path(folder)):
            yield Path(folder)


def redis() -> Redis:
    return Redis.from_url(os.environ["REDIS_URL"])


def queue_name() -> str:
    return TransportSettings.from_environment().queue


def reset() -> None:
    """Empty the tables and Redis; no worker may run."""
    with engine().begin() as db:
        db.execute(text("TRUNCATE portfolio_history, signal_archives, event_outcomes, withdrawals"))
    checkpoint()
    with redis() as client:
        client.flushall()


def checkpoint() -> None:
    """Write the dirty pages of earlier runs to disk, so that the next run does not pay for them."""
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(text("CHECKPOINT"))


def vacuum() -> None:
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(text("VACUUM ANALYZE portfolio_history, signal_archives"))


def machine_facts() -> dict[str, str]:
    """Return the number of cores, the versions, and the durability settings that both servers report."""
    with bench_stack(), engine().connect() as db, redis() as client:
        setting = {
            name: str(db.execute(text("SELECT current_setting(:name)"), {"name": name}).scalar())
            for name in ("server_version", "fsync", "synchronous_commit")
        }
        info = client.info()
        appendfsync = client.config_get("appendfsync")["appendfsync"]
    return {
        "cores": str(os.cpu_count()),
        "Python": platform.python_version(),
        "PostgreSQL": f"{setting['server_version'].split()[0]}, fsync {setting['fsync']},"
        f" synchronous_commit {setting['synchronous_commit']}",
        "Valkey": f"{info.get('valkey_version', info['redis_version'])}, AOF, appendfsync {appendfsync}",
        "RQ": rq.__version__,
    }

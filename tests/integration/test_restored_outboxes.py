"""An outbox that is put back from a backup, removed or replaced: while nobody runs, and under a running controller."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis

from producers.outbox import Outbox
from tests.controllers import (
    Account,
    Bot,
    Controller,
    Line,
    assert_sound,
    audited,
    breaches,
    copy_with_cp,
    doctored,
    settle,
    some_events,
    worker_process,
)

pytestmark = pytest.mark.usefixtures("database_url")

Open = Callable[[str], Controller]


@pytest.fixture
def bot(tmp_path: Path, line: Line) -> Iterator[Open]:
    """Starts a bot in this process, on the outbox in this folder."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(Controller(tmp_path / folder / "outbox.db"))


def _put_over(source: Path, target: Path) -> None:
    """As `cp` does: the same inode gets the other content."""
    before = target.stat().st_ino
    subprocess.run(["cp", str(source), str(target)], check=True)
    assert target.stat().st_ino == before


@pytest.mark.parametrize("redis_is", ["there", "away", "empty"])
@pytest.mark.parametrize("wal", ["without a WAL", "with its own WAL", "beside the newer WAL"])
def test_a_backup_is_put_back_while_nobody_runs(
    redis: Redis, line: Line, tmp_path: Path, wal: str, redis_is: str
) -> None:
    """All that was recorded before the backup, between it and the restore, and afterwards is stored or rejected."""
    path, backup = tmp_path / "bot" / "outbox.db", tmp_path / "backup"
    path.parent.mkdir()
    backup.mkdir()
    accounts: list[Account] = []
    with worker_process(tmp_path):
        with Bot(path) as one:
            one.record(81, 0, 200)
            one.settle()
            one.record(81, 200, 20)
            if wal == "with its own WAL":
                copy_with_cp(path, f"{path}-wal", backup)
            else:
                accounts.append(one.account(ask=False))
                one.stop()
                copy_with_cp(path, backup)
        with Bot(path) as later:  # the hour after the backup
            later.record(81, 300, 200)
            later.record(80, 0, 20, balance=1)
            later.settle()
            accounts += [one.account(ask=False), later.account()]
            later.kill() if wal == "beside the newer WAL" else later.stop()
        assert Path(f"{path}-wal").exists() == (wal == "beside the newer WAL")
        _put_over(backup / path.name, path)
        if wal == "with its own WAL":
            copy_with_cp(backup / f"{path.name}-wal", path.parent)
        if redis_is == "away":
            line.cut()
        if redis_is == "empty":
            redis.flushall()
    with Bot(path) as again:
        again.record(81, 600, 20)
        again.record(80, 0, 20, balance=2)  # the ids of rows that are there, other content
        again.record(81, 300, 20)  # rows that are there, unless the restored file does not know it
        line.mend()
        with worker_process(tmp_path):
            again.record(81, 700, 20)
            again.settle()
        assert_sound(*accounts, again.account(), outboxes=[path])
    if wal != "beside the newer WAL" and redis_is != "empty":
        assert doctored(path, "outbox copies")[0] == "warn"
        assert "was copied or restored" in again.log.read_text()


def _remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def _remove_file(path: Path) -> None:
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def _replace_by_another(path: Path) -> None:
    _run_another(path.with_name("other.db"))
    path.with_name("other.db").rename(path)


def _replace_file_alone(path: Path) -> None:
    """A deployment that syncs the folder: a new file, and the WAL of the old one beside it."""
    path.with_name("new.db").write_bytes(path.read_bytes())
    path.with_name("new.db").rename(path)


def _run_another(path: Path) -> None:
    with Outbox(path) as other:
        other.append("trading-controller", some_events(90, 0, 2))


HARM = {one.__name__.strip("_"): one for one in (_remove_folder, _remove_file, _replace_by_another, _replace_file_alone)}


@pytest.mark.parametrize("redis_is", ["there", "away"])
@pytest.mark.parametrize("harm", HARM)
def test_removed_or_replaced_under_a_running_controller(
    redis: Redis, line: Line, tmp_path: Path, harm: str, redis_is: str
) -> None:
    """No accepted event is lost, calls go on, receipts from before are kept, and a log line says it."""
    path = tmp_path / "bot" / "outbox.db"
    path.parent.mkdir()
    with Bot(path) as one:
        one.record(81, 0, 30)
        if redis_is == "away":
            line.cut()
        one.record(81, 100, 30)
        HARM[harm](path)
        one.record(81, 200, 30)
        one.record(80, 0, 5, balance=2)
        line.mend()
        with worker_process(tmp_path):
            one.settle()
        states = one.states()
        accounts = [one.account()]
        if harm == "replace_by_another":
            accounts.append(_account_of_another())
        assert_sound(*accounts, outboxes=[path])
    assert {state for state, _ in states.values()} == {"stored"}
    assert "was removed or replaced while it was in use" in one.log.read_text()
    with Outbox(path) as outbox:
        assert outbox.quick_check(5) is None


def _account_of_another() -> Account:
    return Account("another", {("", 0, one.event_id): one for one in some_events(90, 0, 2)}, {})

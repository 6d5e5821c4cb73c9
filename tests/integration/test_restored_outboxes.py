"""An outbox is put back from a backup, removed or replaced, while its controller is stopped or running."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis

from producers.history_producer import HistoryProducer
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
    lost,
    some_events,
    worker_process,
)
from tests.rq_programs import until

pytestmark = pytest.mark.usefixtures("database_url")

Open = Callable[[str], Controller]


@pytest.fixture
def bot(tmp_path: Path, line: Line) -> Iterator[Open]:
    """Return a function that starts a bot in this process, on the outbox in a folder."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(Controller(tmp_path / folder / "outbox.db"))


def _put_over(source: Path, target: Path) -> None:
    """Copy over a file with `cp`: the inode stays, the content changes."""
    before = target.stat().st_ino
    subprocess.run(["cp", str(source), str(target)], check=True)
    assert target.stat().st_ino == before


@pytest.mark.parametrize("redis_is", ["there", "away", "empty"])
@pytest.mark.parametrize("wal", ["without a WAL", "with its own WAL", "beside the newer WAL"])
def test_a_backup_put_back_while_no_bot_runs_loses_no_event(
    redis: Redis, line: Line, tmp_path: Path, wal: str, redis_is: str
) -> None:
    """Events from before the backup, from before the restore and from after it are stored or rejected."""
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
        with Bot(path) as later:  # after the backup
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
        again.record(80, 0, 20, balance=2)  # ids of existing rows, with other content
        again.record(81, 300, 20)  # existing rows, which the restored file may not know
        line.restore()
        with worker_process(tmp_path):
            again.record(81, 700, 20)
            again.settle()
        assert_sound(*accounts, again.account(), outboxes=[path])
    if wal != "beside the newer WAL" and redis_is != "empty":
        assert doctored(path, "outbox copies")[0] == "warn"
        assert "was copied or restored" in again.log.read_text()


def _remove_folder(path: Path) -> None:
    """Remove the folder in one step, because the controller creates a new file as soon as it misses its own."""
    shutil.rmtree(path.parent.rename(path.parent.with_name("removed")))


def _remove_file(path: Path) -> None:
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def _replace_by_another(path: Path) -> None:
    _run_another(path.with_name("other.db"))
    path.with_name("other.db").rename(path)


def _replace_by_no_outbox(path: Path) -> None:
    path.with_name("other.db").write_bytes(b"\x1f\x8b" * 10_000)
    path.with_name("other.db").rename(path)


def _replace_file_alone(path: Path) -> None:
    """Replace the file and leave the old WAL beside it, like a deployment that syncs the folder."""
    path.with_name("new.db").write_bytes(path.read_bytes())
    path.with_name("new.db").rename(path)


def _run_another(path: Path) -> None:
    with Outbox(path) as other:
        other.append("trading-controller", some_events(90, 0, 2))


CHANGES = {
    one.__name__.strip("_"): one
    for one in (_remove_folder, _remove_file, _replace_by_another, _replace_by_no_outbox, _replace_file_alone)
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_controller_killed_after_its_outbox_was_removed_or_replaced_loses_no_event(
    line: Line, tmp_path: Path, change: str
) -> None:
    """Redis is away all the time. Events accepted before and after the change are in the file at the path."""
    path = tmp_path / "bot" / "outbox.db"
    path.parent.mkdir()
    line.cut()
    with Bot(path) as one:
        one.record(81, 0, 30)
        CHANGES[change](path)
        one.record(81, 200, 1)
        one.kill()
    accounts = [one.account(ask=False)]
    line.restore()
    with worker_process(tmp_path), Bot(path) as again:
        again.record(82, 0, 3)
        again.settle()
        accounts.append(again.account())
    if change == "replace_by_another":
        accounts.append(_account_of_another())
    assert_sound(*accounts, outboxes=[path])


@pytest.mark.parametrize("redis_is", ["there", "away"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_running_controller_continues_after_its_outbox_was_removed_or_replaced(
    redis: Redis, line: Line, tmp_path: Path, change: str, redis_is: str
) -> None:
    """No accepted event is lost, earlier receipts stay valid, and one log line reports the change."""
    path = tmp_path / "bot" / "outbox.db"
    path.parent.mkdir()
    with Bot(path) as one:
        one.record(81, 0, 30)
        if redis_is == "away":
            line.cut()
        one.record(81, 100, 30)
        CHANGES[change](path)
        one.record(81, 200, 30)
        one.record(80, 0, 5, balance=2)
        line.restore()
        with worker_process(tmp_path):
            one.settle()
        states = one.states()
        accounts = [one.account()]
        if change == "replace_by_another":
            accounts.append(_account_of_another())
        assert_sound(*accounts, outboxes=[path])
    assert {state for state, _ in states.values()} == {"stored"}
    assert "was removed or replaced while it was in use" in one.log.read_text()
    with Outbox(path) as outbox:
        assert outbox.quick_check(5) is None


@pytest.mark.parametrize("redis_is", ["there", "away"])
@pytest.mark.parametrize("backup_of", ["file", "file and WAL"])
@pytest.mark.parametrize("count", [5, 500])
def test_a_backup_copied_over_the_open_outbox_fails_no_call(
    line: Line, tmp_path: Path, backup_of: str, redis_is: str, count: int
) -> None:
    """SQLite does not notice it, and the file then has pages of two times.

    With Redis there, nothing is lost. With Redis away, an entry is lost if `cp` overwrote its page: audit reports its
    number, and log and doctor report the damage. Events recorded afterwards are always stored.
    """
    path, backup = tmp_path / "bot" / "outbox.db", tmp_path / "backup"
    path.parent.mkdir()
    backup.mkdir()
    ends = ["", "-wal"] if backup_of == "file and WAL" else [""]
    with ExitStack() as stack:
        if redis_is == "there":
            stack.enter_context(worker_process(tmp_path))
        else:
            line.cut()
        one = stack.enter_context(Bot(path))
        one.record(81, 0, count)
        if redis_is == "there":
            one.settle()
        copy_with_cp(*(f"{path}{end}" for end in ends), backup)
        one.record(82, 0, count)
        if redis_is == "there":
            one.settle()
        for end in ends:
            _put_over(backup / f"{path.name}{end}", Path(f"{path}{end}"))
        at_risk = set(one.accepted)
        one.record(83, 0, count)
        line.restore()
        with worker_process(tmp_path):
            one.settle()
            one.record(84, 0, 1)
            one.settle()
        account = one.account(ask=False)
    gone = lost(account)
    # A relay reads the whole file when it starts.
    with worker_process(tmp_path), HistoryProducer(outbox=path) as producer:
        until(lambda: producer._transport.relay.turn.started)
        producer.settle(30)
    status, sources = audited(path)
    if redis_is == "there":
        assert not gone
        assert (status, one.log.read_text().count("Traceback")) == (0, 0)
        return
    assert gone <= at_risk
    assert (status == 1) == bool(gone)
    missing = {(s["source"], n) for s in sources for first, last in s["missing"] for n in range(first, last + 1)}
    assert {(source, number) for source, number, _ in gone} == missing
    assert len(breaches([account])) == len(gone)
    if gone:
        assert "the file is damaged and was moved to" in one.log.read_text()
        assert doctored(path, "outbox file")[0] == "warn"


def _account_of_another() -> Account:
    return Account("another", {("", 0, one.event_id): one for one in some_events(90, 0, 2)}, {})

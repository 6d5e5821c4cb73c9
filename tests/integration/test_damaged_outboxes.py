"""A damaged outbox is quarantined without delay for new events: readable entries are delivered, losses are reported."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
from redis import Redis

from producers.outbox import Outbox
from tests.controllers import Bot, Key, Line, audited, breaches, cli, copy_with_cp, doctored, lost, worker_process
from tests.rq_programs import until

pytestmark = pytest.mark.usefixtures("database_url")

_NEW_SECONDS = 20.0


def _damage(path: Path, *, at: float = 0.5, length: int = 20_000) -> None:
    """Overwrite bytes of the file, by default in its middle, like a bad block."""
    offset = int(path.stat().st_size * at) // 4096 * 4096
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(random.Random(1).randbytes(length))


def _with_pending(path: Path, count: int) -> Bot:
    """Run a bot that records events while Redis is away; all of them are in the file itself, without a log."""
    path.parent.mkdir()
    with Bot(path) as bot:
        bot.record(81, 0, count)
        bot.stop()
    assert not Path(f"{path}-wal").exists()
    return bot


def _ranges(keys: set[Key]) -> set[int]:
    return {number for _, number, _ in keys}


@pytest.mark.parametrize("redis_is", ["there", "away for a while"])
def test_twenty_damaged_kilobytes_among_300_pending_entries_do_not_delay_new_events(
    redis: Redis, line: Line, tmp_path: Path, redis_is: str
) -> None:
    """New events and readable entries are stored within 20 s. Log, doctor and audit report the lost numbers."""
    path = tmp_path / "bot" / "outbox.db"
    line.cut()
    old = _with_pending(path, 300)
    _damage(path)
    if redis_is == "there":
        line.restore()
    with worker_process(tmp_path), Bot(path) as bot:
        bot.record(82, 0, 5)
        line.restore()
        deadline = time.monotonic() + _NEW_SECONDS
        until(lambda: {state for state, _ in bot.states().values()} == {"stored"}, _NEW_SECONDS)
        assert time.monotonic() < deadline
        bot.settle()
        new = bot.account()
    before = old.account(ask=False)
    gone = lost(before)

    assert len(breaches([before, new])) == len(gone)
    assert 0 < len(gone) < 60
    status, sources = audited(path)
    (source,) = {source for source, _, _ in gone}
    (found,) = [audit for audit in sources if audit["source"] == source]
    named = {number for first, last in found["missing"] for number in range(first, last + 1)}
    assert (status, named) == (1, _ranges(gone))
    assert all(not audit["missing"] for audit in sources if audit["source"] != source)
    checked, found_by_doctor = doctored(path, "outbox file")
    assert checked == "warn"
    for text in (found_by_doctor, bot.log.read_text()):
        assert all(f"{number}" in text for number in (min(named), max(named)))
    assert source in found_by_doctor
    assert cli("outbox", "status", outbox=path).exit_code == 0


def test_outbox_status_and_doctor_find_damage(line: Line, tmp_path: Path) -> None:
    """No producer or relay has found it yet. The commands change nothing."""
    path = tmp_path / "bot" / "outbox.db"
    line.cut()
    _with_pending(path, 300)
    assert json.loads(cli("outbox", "status", "--json", outbox=path).stdout)["check"] == "sound"
    _damage(path)
    line.restore()
    before = sorted(one.name for one in path.parent.iterdir() if not one.name.endswith(("-wal", "-shm")))

    shown = cli("outbox", "status", "--json", outbox=path)
    status, found = doctored(path, "outbox file")

    assert shown.exit_code == 1
    assert json.loads(shown.stdout)["check"] not in ("sound", None)
    assert status == "fail"
    assert found.startswith("damaged: ")
    assert sorted(one.name for one in path.parent.iterdir() if not one.name.endswith(("-wal", "-shm"))) == before


def test_entries_behind_a_damaged_first_page_are_delivered(redis: Redis, line: Line, tmp_path: Path) -> None:
    """SQLite does not recognize the file as a database, and `outbox status` and doctor fail."""
    path = tmp_path / "bot" / "outbox.db"
    line.cut()
    old = _with_pending(path, 300)
    _damage(path, at=0.0, length=4096)
    shown = cli("outbox", "status", outbox=path)
    assert shown.exit_code == 1
    assert doctored(path, "outbox file")[0] == "fail"
    line.restore()
    with worker_process(tmp_path), Bot(path) as bot:
        bot.record(82, 0, 5)
        bot.settle()
        new = bot.account()
    assert lost(new) == set()
    assert breaches([old.account(ask=False), new]) == []


def test_outbox_salvage_reads_a_damaged_file_in_another_folder(redis: Redis, line: Line, tmp_path: Path) -> None:
    """The outbox is in use. Readable entries are delivered; a second salvage only makes duplicates."""
    path, elsewhere = tmp_path / "bot" / "outbox.db", tmp_path / "old disk"
    line.cut()
    old = _with_pending(path, 300)
    elsewhere.mkdir()
    os.rename(path, elsewhere / "damaged")
    _damage(elsewhere / "damaged")
    line.restore()
    with worker_process(tmp_path), Bot(path) as bot:
        bot.record(82, 0, 5)
        salvaged = cli("outbox", "salvage", str(elsewhere / "damaged"), outbox=path)
        bot.settle()
        new = bot.account()
        gone = lost(old.account(ask=False))
        again = cli("outbox", "salvage", str(elsewhere / "damaged"), outbox=path)
        bot.settle()

        assert (salvaged.exit_code, again.exit_code) == (0, 0)
        assert f"salvaged {300 - len(gone)} entries from " in salvaged.stdout
        assert 0 < len(gone) < 60
        assert _ranges(gone) == _ranges(lost(old.account(ask=False)))
        assert len(breaches([old.account(ask=False), new])) == len(gone)
        assert audited(path)[0] == 1
        assert cli("outbox", "salvage", str(path), outbox=path).exit_code == 1
    assert (elsewhere / "damaged").exists()


def test_audit_reports_no_loss_if_the_damaged_entries_were_stored(redis: Redis, line: Line, tmp_path: Path) -> None:
    """Its exit status is 0, with the outbox and without it."""
    path = tmp_path / "bot" / "outbox.db"
    path.parent.mkdir()
    with worker_process(tmp_path):
        with Bot(path) as old:
            old.record(81, 0, 300)
            old.settle()
            before = old.account()
            old.stop()
        _damage(path)
        with Bot(path) as bot:
            bot.record(82, 0, 5)
            bot.settle()
            new = bot.account()
    assert breaches([before, new]) == []
    assert audited(path)[0] == audited(None)[0] == 0


def test_damage_while_two_bots_use_the_outbox_fails_no_call(redis: Redis, line: Line, tmp_path: Path) -> None:
    """One of them quarantines the file, and the other one continues with the new file."""
    path = tmp_path / "bot" / "outbox.db"
    path.parent.mkdir()
    line.cut()
    with worker_process(tmp_path), Bot(path) as one, Bot(path) as two:
        one.record(81, 0, 300)
        two.record(82, 0, 300)
        _damage(path)
        _damage(Path(f"{path}-wal"))
        one.record(83, 0, 20)
        two.record(84, 0, 20)
        line.restore()
        one.settle()
        two.settle()
        one.record(85, 0, 20)
        two.record(86, 0, 20)
        one.settle()
        two.settle()
        accounts = [one.account(ask=False), two.account(ask=False)]
    assert len(breaches(accounts)) == sum(len(lost(account)) for account in accounts)
    gone = {dict(account.accepted[key])["portfolio_id"] for account in accounts for key in lost(account)}
    assert gone <= {81, 82, 83, 84}
    log = one.log.read_text()  # both bots write to it
    assert log.count("was moved to") == 1
    assert "Error: [Errno" not in log
    assert not list(path.parent.glob("*taken-out*"))


def test_a_damaged_copy_is_recognized_by_its_content(line: Line, tmp_path: Path) -> None:
    """No relay has left a lock beside it, and the producer still quarantines it."""
    path = tmp_path / "bot" / "outbox.db"
    line.cut()
    _with_pending(path, 50)
    (tmp_path / "other").mkdir()
    copy_with_cp(path, tmp_path / "other")
    _damage(tmp_path / "other" / "outbox.db", at=0.0, length=4096)
    with Outbox(tmp_path / "other" / "outbox.db", repair=True) as outbox:
        assert outbox.entries() == []
        (moved,) = outbox.quarantine.damaged_files()
        assert outbox.quarantine.salvage(moved).entries == 50

"""A damaged outbox is quarantined and never in the way: its readable entries are delivered, the loss is named."""

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
    """As a bad block does: bytes in the middle of the file become others."""
    offset = int(path.stat().st_size * at) // 4096 * 4096
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(random.Random(1).randbytes(length))


def _with_pending(path: Path, count: int) -> Bot:
    """A bot that has recorded events while Redis was away, and has ended; all of them are in the file itself."""
    path.parent.mkdir()
    with Bot(path) as bot:
        bot.record(81, 0, count)
        bot.stop()
    assert not Path(f"{path}-wal").exists()
    return bot


def _ranges(keys: set[Key]) -> set[int]:
    return {number for _, number, _ in keys}


@pytest.mark.parametrize("redis_is", ["there", "away for a while"])
def test_twenty_kilobytes_in_the_middle_of_300_pending_entries(
    redis: Redis, line: Line, tmp_path: Path, redis_is: str
) -> None:
    """New events are stored within 20 s, the readable entries too; log, doctor and audit name the lost numbers."""
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
    checked, told = doctored(path, "outbox file")
    assert checked == "warn"
    for text in (told, bot.log.read_text()):
        assert all(f"{number}" in text for number in (min(named), max(named)))
    assert source in told
    assert cli("outbox", "status", outbox=path).exit_code == 0


def test_damage_that_nobody_has_met_yet_is_shown(line: Line, tmp_path: Path) -> None:
    """By `outbox status` and `doctor`, which change nothing."""
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


def test_the_first_page_is_damaged(redis: Redis, line: Line, tmp_path: Path) -> None:
    """SQLite does not take the file for a database: status and doctor say so, and its entries are delivered."""
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


def test_salvage_of_a_file_that_was_quarantined_elsewhere(redis: Redis, line: Line, tmp_path: Path) -> None:
    """Into an outbox that is in use: the readable entries are delivered; once more, and they are duplicates."""
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


def test_nothing_is_lost_if_the_damaged_entries_were_stored(redis: Redis, line: Line, tmp_path: Path) -> None:
    """Audit has exit status 0 then."""
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


def test_damage_under_a_running_bot_while_two_processes_use_the_outbox(
    redis: Redis, line: Line, tmp_path: Path
) -> None:
    """One of them quarantines the file, the other one goes on in the new file; no call fails."""
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
    log = one.log.read_text()  # of both
    assert log.count("was moved to") == 1
    assert "Error: [Errno" not in log
    assert not list(path.parent.glob("*taken-out*"))


def test_a_copy_that_was_torn_is_known_by_its_content(line: Line, tmp_path: Path) -> None:
    """No relay ever was beside it: the producer quarantines it all the same, and goes on."""
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

"""Folders of bots are copied with their outbox: each event is stored or rejected for the bot that recorded it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from producers.outbox import Outbox
from producers.redis_keys import token_key
from tests.controllers import (
    Bot,
    Controller,
    Line,
    assert_sound,
    audited,
    copy_with_cp,
    doctored,
    settle,
    some_events,
    wait_until_settled,
    worker_process,
)
from tests.deliveries import burst
from tests.factories import a_snapshot, an_archive
from tests.rq_programs import until

pytestmark = pytest.mark.usefixtures("database_url")

Open = Callable[[str], Controller]


@pytest.fixture
def bot(tmp_path: Path, line: Line) -> Iterator[Open]:
    """Return a function that starts a bot in this process, on the outbox in a folder."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(Controller(tmp_path / folder / "outbox.db"))


@contextmanager
def _worker(when: str, folder: Path) -> Iterator[Callable[[], None]]:
    """Run a worker. The yielded function starts a `late` worker; it kills and replaces a `killed` one."""
    with ExitStack() as stack:
        running = stack.enter_context(worker_process(folder)) if when != "late" else None

        def now() -> None:
            if running is None or when == "killed":
                if running is not None:
                    running.kill()
                stack.enter_context(worker_process(folder))

        yield now


def _same_cycle(bot: Controller, balance: int) -> None:
    """Record snapshots of the same portfolio and times as other bots: the first 4 are equal, the others differ."""
    for number in range(8):
        bot.record(a_snapshot(after=timedelta(days=1, seconds=number), balance=balance if number > 3 else 7))
    bot.record(an_archive(after=timedelta(days=1), signals=[{"market_id": str(balance)}]))


@pytest.mark.parametrize("when", ["running", "late", "killed"])
@pytest.mark.parametrize("state", ["settled", "sent", "pending"])
def test_a_folder_copied_while_the_bot_is_stopped_delivers_the_events_of_both(
    bot: Open, redis: Redis, line: Line, state: str, when: str
) -> None:
    """Each bot records different events and events with the same ids, some of them with other content."""
    one = bot("one")
    tmp_path = one.path.parent.parent
    one.record(*some_events(80, 0, 3))
    if state == "settled":
        one.producer.flush(10)
        burst(redis)
        settle(one)
    if state == "sent":
        assert one.producer.flush(10) == 0
    if state == "pending":
        line.cut()
    one.record(*some_events(80, 10, 3))
    one.stop()
    copy_with_cp(tmp_path / "one", tmp_path / "two")
    line.restore()

    with _worker(when, tmp_path) as change_worker:
        one.restart()
        two = bot("two")
        for balance, each in enumerate((one, two), start=100):
            each.record(*some_events(balance, 0, 5))
            _same_cycle(each, balance)
        change_worker()
        settle(one, two)
    assert_sound(one.account(), two.account(), outboxes=[one.path, two.path])


def test_two_copies_that_use_the_same_numbers_deliver_all_events(
    bot: Open, redis: Redis, line: Line, tmp_path: Path
) -> None:
    """Redis is away while both record. Audit reports the source as copied and ends with 0: nothing is missing."""
    one = bot("one")
    one.record(*some_events(80, 0, 3))
    one.stop()
    line.cut()
    copy_with_cp(tmp_path / "one", tmp_path / "two")
    one.restart()
    two = bot("two")
    for balance, each in enumerate((one, two), start=100):
        _same_cycle(each, balance)
        each.record(*some_events(balance, 0, 3))
    used_twice = sorted({n for _, n, _ in one.accepted} & {n for _, n, _ in two.accepted})
    line.restore()
    with worker_process(tmp_path):
        settle(one, two)

    assert_sound(one.account(), two.account(), outboxes=[one.path, two.path])
    ((source, *_),) = {key[:1] for key in one.accepted}
    different = [n for n in used_twice if len({k[2] for k in [*one.accepted, *two.accepted] if k[1] == n}) > 1]
    for outbox in (one.path, two.path, None):
        status, sources = audited(outbox)
        (shared,) = [audit for audit in sources if audit["source"] == source]
        assert (status, shared["copied"], shared["tail_known"]) == (0, True, False)
        assert shared["shared"] == different != []


def test_audit_finds_a_lost_event_of_one_copy_with_that_copys_outbox(
    bot: Open, redis: Redis, line: Line, tmp_path: Path
) -> None:
    """If copies share a number, a row of the other copy with the same number does not count."""
    one = bot("one")
    one.record(*some_events(80, 0, 1))
    one.stop()
    line.cut()
    copy_with_cp(tmp_path / "one", tmp_path / "two")
    one.restart()
    two = bot("two")
    one.record(*some_events(81, 0, 3))
    (lost, *_) = two.record(*some_events(82, 0, 3))
    line.restore()
    with worker_process(tmp_path):
        settle(one, two)
    assert_sound(one.account(), two.account(), outboxes=[one.path, two.path])

    with get_db() as db:
        db.execute(text("DELETE FROM portfolio_history WHERE event_id = :id"), {"id": lost.event_id})
    status, sources = audited(two.path)
    assert status == 1
    assert [audit["mismatched"] for audit in sources if audit["source"] == lost.source] == [[lost.sequence]]


def test_each_copy_has_its_own_source_after_the_token_exchange(
    bot: Open, redis: Redis, line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy that starts second changes its source once. Its log reports that, and so does doctor."""
    one = bot("one")
    one.record(*some_events(80, 0, 3))
    assert one.producer.flush(10) == 0
    one.stop()
    copy_with_cp(tmp_path / "one", tmp_path / "two")
    one.restart()
    until(lambda: redis.get(token_key(next(iter(one.accepted))[0])) == _token(one).encode())
    two = bot("two")
    until(lambda: "was copied or restored" in caplog.text)
    first = one.record(*some_events(81, 0, 3))
    second = two.record(*some_events(82, 0, 3))
    with worker_process(tmp_path):
        settle(one, two)

    assert_sound(one.account(), two.account(), outboxes=[one.path, two.path])
    assert {r.source for r in first} == {next(iter(one.accepted))[0]}
    assert {r.source for r in second}.isdisjoint({r.source for r in first})
    assert [r.sequence for r in second] == [1, 2, 3, 4]
    assert caplog.text.count("was copied or restored") == 1
    assert doctored(two.path, "outbox copies")[0] == "warn"
    assert doctored(one.path, "outbox copies") == ("ok", "no other copy found")
    assert all(audit["shared"] == [] for audit in audited(None)[1])


def _token(one: Controller) -> str:
    with Outbox(one.path) as outbox:
        return outbox.header.read().token


@pytest.mark.parametrize("redis_is", ["there", "away"])
def test_three_copies_and_a_copy_of_a_copy_deliver_all_events(
    bot: Open, redis: Redis, line: Line, tmp_path: Path, redis_is: str
) -> None:
    """All four run at the same time and record different events and the same ids with other content."""
    first = bot("0")
    first.record(*some_events(80, 0, 3))
    first.producer.flush(10)
    first.stop()
    copy_with_cp(tmp_path / "0", tmp_path / "1")
    copy_with_cp(tmp_path / "0", tmp_path / "2")
    second = bot("1")
    second.record(*some_events(81, 0, 2))
    second.producer.flush(10)
    second.stop()
    copy_with_cp(tmp_path / "1", tmp_path / "3")
    if redis_is == "away":
        line.cut()
    first.restart()
    second.restart()
    bots = [first, second, bot("2"), bot("3")]
    for _ in range(2):
        for number, each in enumerate(bots):
            each.record(*some_events(100 + number, len(each.accepted), 4))
            _same_cycle(each, number)
    line.restore()
    with worker_process(tmp_path):
        settle(*bots)
    assert_sound(*(each.account() for each in bots), outboxes=[each.path for each in bots])


@pytest.mark.parametrize("copied", ["the folder", "the files of the database"])
def test_a_copy_made_while_the_bot_records_delivers_all_events(
    redis: Redis, line: Line, tmp_path: Path, copied: str
) -> None:
    """Such a copy may be inconsistent: then it counts as damaged and is salvaged. The original is not affected."""
    (tmp_path / "one").mkdir()
    with worker_process(tmp_path), ExitStack() as stack:
        one = stack.enter_context(Bot(tmp_path / "one" / "outbox.db"))
        one.record(81, 0, 50)
        copying = subprocess.Popen([sys.executable, "-c", _COPY, copied], cwd=tmp_path)
        for number in range(1, 100):
            one.record(81, 50 * number, 50)
            if copying.poll() is not None:
                break
        assert copying.wait(20) == 0
        copies = [stack.enter_context(Bot(tmp_path / name / "outbox.db")) for name in ("two", "three")]
        for number, each in enumerate([one, *copies], start=81):
            each.record(number, 10_000, 30)
            each.record(80, 0, 10, balance=number)
        for each in (one, *copies):
            each.settle()
        accounts = [each.account() for each in (one, *copies)]
    assert_sound(*accounts, outboxes=[each.path for each in (one, *copies)])


_COPY = """
import os, shutil, sys, time
time.sleep(0.3)
for name in ("two", "three"):
    if sys.argv[1] == "the folder":
        shutil.copytree("one", name)
    else:
        os.mkdir(name)
        for end in ("", "-wal", "-shm"):
            shutil.copy(f"one/outbox.db{end}", f"{name}/outbox.db{end}")
"""


def test_entries_that_were_sent_before_the_copy_are_settled_in_both_copies(
    bot: Open, redis: Redis, line: Line, tmp_path: Path
) -> None:
    """They are the same deliveries in both outboxes: each has one row, and both outboxes are acknowledged."""
    one = bot("one")
    receipts = one.record(*some_events(80, 0, 20))
    assert one.producer.flush(10) == 0
    one.stop()
    copy_with_cp(tmp_path / "one", tmp_path / "two")
    burst(redis)
    one.restart()
    settle(one)  # it has read the acknowledgements
    two = bot("two")
    with worker_process(tmp_path):
        wait_until_settled(two.path)
    assert_sound(one.account(), outboxes=[one.path, two.path])
    with Outbox(two.path) as outbox:
        assert (outbox.status().stored, outbox.status().rejected) == (len(receipts), 0)


def test_copies_at_the_same_relative_path_in_two_folders_deliver_all_events(
    redis: Redis, line: Line, tmp_path: Path
) -> None:
    """Two containers are made of one image that has an outbox: the path does not distinguish them."""
    image = tmp_path / "image"
    (image / "data").mkdir(parents=True)
    with Bot(image / "data" / "outbox.db") as first:
        first.record(80, 0, 5)
        first.stop()
    for name in ("a", "b"):
        copy_with_cp(image, tmp_path / name)
    with worker_process(tmp_path), ExitStack() as stack:
        bots = [stack.enter_context(Bot(tmp_path / name / "data" / "outbox.db")) for name in "ab"]
        for number, each in enumerate(bots):
            each.record(81 + number, 0, 20)
            each.record(80, 100, 10, balance=number)
        for each in bots:
            each.settle()
        accounts = [first.account(ask=False), *(each.account() for each in bots)]
    assert_sound(*accounts, outboxes=[each.path for each in bots])


def test_one_volume_under_two_paths_is_one_outbox(redis: Redis, line: Line, tmp_path: Path) -> None:
    """The second path is a symbolic link to the folder: one bot relays at a time, and no copy is reported."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "mounted").symlink_to("volume")
    with Bot(tmp_path / "volume" / "outbox.db") as one, Bot(tmp_path / "mounted" / "outbox.db") as two:
        for round_ in range(3):
            one.record(81, 10 * round_, 10)
            two.record(82, 10 * round_, 10)
            two.record(81, 10 * round_, 10)  # the same facts
        with worker_process(tmp_path):
            one.settle()
            two.settle()
        assert_sound(one.account(), two.account(), outboxes=[one.path, two.path])
        one.kill()  # the other bot takes over
        two.record(82, 100, 10)
        with worker_process(tmp_path):
            two.settle()
        assert_sound(one.account(ask=False), two.account(), outboxes=[one.path, two.path])
    sources = {source for source, _, _ in [*one.accepted, *two.accepted]}
    assert len(sources) == 1
    assert doctored(two.path, "outbox copies") == ("ok", "no other copy found")
    assert "copied or restored" not in "".join(log.read_text() for log in tmp_path.glob("*.log"))


def test_two_paths_in_one_process_have_one_relay(redis: Redis, line: Line, tmp_path: Path, bot: Open) -> None:
    """Two bots in one process use the paths."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "mounted").symlink_to("volume")
    one, two = bot("volume"), bot("mounted")
    one.record(*some_events(81, 0, 3))
    two.record(*some_events(82, 0, 3))
    until(lambda: one.producer.flush(0) == 0)
    have_lock: list[Any] = [each.producer._transport.relay.turn.is_exclusive for each in (one, two)]
    with worker_process(tmp_path):
        settle(one, two)
    assert sorted(have_lock) == [False, True]
    assert_sound(one.account(), two.account(), outboxes=[one.path])

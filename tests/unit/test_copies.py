"""Copies of an outbox: a relay detects them by a token in Redis, and each copy settles its own events only."""

from __future__ import annotations

import itertools
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest

from producers import copies, entry_sender
from producers.acknowledgements import Outcome, acknowledgement_text, shown
from producers.entries import Accepted, EntryStatus
from producers.events import Payload
from producers.fake_worker import FakeWorker
from producers.outbox import Outbox
from producers.redis_keys import acknowledgement_key, job_id_of, token_key
from producers.relay import Relay
from tests.factories import a_snapshot
from tests.unit.conftest import queue_of

NAME = "trading-controller"
DAYS = 24 * 3600


class Bot:
    """Producer on one outbox, whose relay sweeps when the test calls it. It remembers its accepted events."""

    def __init__(self, path: Path, redis: fakeredis.FakeRedis) -> None:
        self.path = path
        self.outbox = Outbox(path, repair=True)
        self.relay = Relay(self.outbox, redis, "history", keep_seconds=3600.0)
        self.accepted: list[Accepted] = []

    def record(self, *payloads: Payload, name: str = NAME) -> str:
        """Record the payloads, and return their source."""
        self.accepted += self.outbox.append(name, payloads)
        return self.accepted[-1].source

    def statuses(self) -> list[EntryStatus]:
        return [self.outbox.status_of(one) for one in self.accepted]

    def close(self) -> None:
        self.relay.stop()
        self.outbox.close()


@pytest.fixture
def bot(tmp_path: Path, redis: fakeredis.FakeRedis) -> Iterator[Callable[[str], Bot]]:
    """Return a function that opens the outbox in a folder."""
    opened: list[Bot] = []

    def open_outbox(folder: str) -> Bot:
        opened.append(Bot(tmp_path / folder / "outbox.db", redis))
        return opened[-1]

    yield open_outbox
    for one in opened:
        one.close()


@pytest.fixture(autouse=True)
def _compare_tokens_at_each_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_CHECK_SECONDS", 0.0)


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sent entry is overdue at the next sweep."""
    monkeypatch.setattr(entry_sender, "_check_interval", lambda checks: -1.0)


def _copy(one: Bot, folder: str) -> None:
    shutil.copytree(one.path.parent, one.path.parent.with_name(folder))


def _acknowledge(redis: fakeredis.FakeRedis, one: Accepted, outcome: Outcome, seconds_ago: float = 0) -> str:
    """Acknowledge one entry as a worker does, and return the field."""
    field = job_id_of(one.source_id, one.sequence, one.nonce)
    text = acknowledgement_text(int(redis.time()[0] - seconds_ago), one.event_id, outcome)
    redis.hset(acknowledgement_key(one.source), field, text)
    return field


def _sweep(*bots: Bot) -> None:
    for one in bots:
        while one.relay.sweep():
            pass


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("while_open", [False, True])
def test_one_of_two_copies_keeps_the_source_and_the_other_gets_a_new_one(
    bot: Callable[[str], Bot], caplog: pytest.LogCaptureFixture, while_open: bool, first: str
) -> None:
    """The folder of a bot is copied for a second bot, while the first one is stopped or while it runs."""
    original = bot("a")
    source = original.record(a_snapshot())
    _sweep(original)
    if not while_open:
        original.close()
    assert original.path.with_name("outbox.db-wal").exists() == while_open
    _copy(original, "b")
    if not while_open:
        original = bot("a")
    copy = bot("b")
    one, other = (original, copy) if first == "a" else (copy, original)
    _sweep(one, other)
    if while_open:
        # A relay exchanges the token when it begins. A bot that continued to run finds the new token later.
        one, other = copy, original
        _sweep(original)
    sources = {one: one.record(a_snapshot()), other: other.record(a_snapshot())}
    _sweep(one, other, one, other)
    sources_later = {one: one.record(a_snapshot()), other: other.record(a_snapshot())}

    assert sources == sources_later
    assert sources[one] == source
    assert sources[other] != source
    assert sources[other].startswith(f"{NAME}/")
    left = [record.getMessage() for record in caplog.records if "was copied or restored" in record.getMessage()]
    assert len(left) == 1
    assert f"outbox {other.path} was copied" in left[0]
    assert source in left[0]
    (before, now) = other.outbox.sources()
    assert (before.full_name, before.current, before.left_because) == (source, False, "copied")
    assert (now.full_name, now.current, now.left_because) == (sources[other], True, None)


@pytest.mark.parametrize("same_events", [False, True])
def test_copies_that_use_the_same_numbers_settle_their_own_events(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis, same_events: bool
) -> None:
    """Each receipt reports the row or rejection for its own event, whichever relay reads first."""
    original = bot("a")
    original.record(a_snapshot(after=timedelta(hours=1)))
    original.close()
    _copy(original, "b")
    a, b = bot("a"), bot("b")
    for n in range(3):
        a.record(a_snapshot(after=timedelta(n), balance=100 + n))
        b.record(a_snapshot(after=timedelta(n if same_events else 10 + n), balance=200 + n))
    assert [(one.source, one.sequence) for one in a.accepted] == [(one.source, one.sequence) for one in b.accepted]
    _sweep(a, b)
    assert len(set(queue_of(redis).job_ids)) == 7  # one of them is in both outboxes
    answers = FakeWorker(redis, "history").work()
    outcomes = {answer.job_id: answer.outcome for answer in answers}
    _sweep(b, a, b)

    for one in (a, b):
        for accepted, status in zip(one.accepted, one.statuses(), strict=True):
            outcome = outcomes[job_id_of(accepted.source_id, accepted.sequence, accepted.nonce)]
            assert (status.row_id, status.reason) == (outcome.row_id, outcome.reason)
    row_ids = [status.row_id for status in (*a.statuses(), *b.statuses()) if status.row_id]
    assert len(row_ids) == len(set(row_ids)) == (3 if same_events else 6)
    assert [status.state for status in b.statuses()] == ["rejected" if same_events else "stored"] * 3


def test_a_relay_keeps_acknowledgements_of_entries_that_it_does_not_have(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis
) -> None:
    """A copy that is not running now will read them later."""
    a = bot("a")
    a.record(a_snapshot())
    a.close()
    _copy(a, "b")
    a, b = bot("a"), bot("b")
    a.record(a_snapshot(after=timedelta(1)))
    b.record(a_snapshot(after=timedelta(2)))
    _sweep(b)
    fields = {_acknowledge(redis, one, Outcome("stored", row_id=9)) for one in b.accepted}
    _sweep(a)
    _acknowledge(redis, a.accepted[0], Outcome("stored", row_id=8))
    _sweep(a, a)
    assert {shown(field) for field in redis.hkeys(acknowledgement_key(b.accepted[0].source))} == fields
    _sweep(b)

    assert (a.statuses()[0].row_id, b.statuses()[0].row_id) == (8, 9)
    assert redis.hkeys(acknowledgement_key(b.accepted[0].source)) == []


def test_acknowledgements_of_unknown_entries_are_removed_after_seven_days_of_redis_clock(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis
) -> None:
    """Any relay of the source removes them: the outbox that waited for them may no longer exist."""
    a = bot("a")
    a.record(a_snapshot())
    _sweep(a)
    accepted = a.accepted[0]
    source_id, source = accepted.source_id, accepted.source
    for n, seconds_ago in enumerate((7 * DAYS - 60, 7 * DAYS + 60)):
        text = acknowledgement_text(int(redis.time()[0] - seconds_ago), None, Outcome("rejected", reason="no"))
        redis.hset(acknowledgement_key(source), job_id_of(source_id, n + 5, "0" * 16), text)
    _sweep(a)

    assert redis.hkeys(acknowledgement_key(source)) == [job_id_of(source_id, 5, "0" * 16).encode()]


@pytest.mark.usefixtures("_at_once")
def test_an_entry_that_both_copies_have_is_settled_in_both(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis
) -> None:
    """The first relay removes the acknowledgement; the second one sends again and reads the next acknowledgement."""
    a = bot("a")
    a.record(a_snapshot(), a_snapshot(after=timedelta(1)))
    a.relay.sweep()
    a.close()
    _copy(a, "b")
    shared, a, b = a.accepted, bot("a"), bot("b")
    worker = FakeWorker(redis, "history")
    answers = worker.work()
    _acknowledge(redis, shared[0], answers[0].outcome)
    redis.hdel(acknowledgement_key(shared[1].source), answers[1].job_id)  # so that `a` continues to read there
    a.relay.sweep()
    redis.delete(queue_of(redis).key)
    redis.delete(f"rq:job:{answers[1].job_id}")
    assert (a.outbox.status_of(shared[0]).state, redis.hlen(acknowledgement_key(shared[0].source))) == ("stored", 0)

    b.relay.sweep()
    again = {answer.job_id: answer.outcome.kind for answer in worker.work()}
    assert again[answers[0].job_id] == "duplicate"
    redis.hdel(acknowledgement_key(shared[1].source), answers[1].job_id)
    a.relay.sweep()
    assert redis.hkeys(acknowledgement_key(shared[0].source)) == [answers[0].job_id.encode()]
    b.relay.sweep()
    assert b.outbox.status_of(shared[0]) == EntryStatus("stored", answers[0].outcome.row_id, None)
    assert redis.hlen(acknowledgement_key(shared[0].source)) == 0


@pytest.mark.parametrize(("seconds_ago", "left"), [(50, 1), (70, 0)])
def test_an_acknowledgement_of_a_settled_entry_is_kept_for_a_copy_for_a_minute(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis, seconds_ago: float, left: int
) -> None:
    """Its age is measured by Redis' clock, which also gave it its time."""
    a = bot("a")
    a.record(a_snapshot(), a_snapshot(after=timedelta(1)))
    _sweep(a)
    _acknowledge(redis, a.accepted[0], Outcome("stored", row_id=1))
    _sweep(a)
    _acknowledge(redis, a.accepted[0], Outcome("duplicate", row_id=1), seconds_ago)
    _sweep(a)

    assert redis.hlen(acknowledgement_key(a.accepted[0].source)) == left


class Crash(BaseException):
    """End of the process at this point."""


def _crash(*_: Any) -> None:
    raise Crash


@pytest.mark.parametrize("crashes", list(itertools.product(["before", "between", "after", "never"], repeat=2)))
def test_a_relay_that_crashes_while_it_exchanges_the_token_is_not_taken_for_a_copy(
    bot: Callable[[str], Bot],
    redis: fakeredis.FakeRedis,
    monkeypatch: pytest.MonkeyPatch,
    crashes: tuple[str, ...],
) -> None:
    """It crashes before Redis has the new token, or before the outbox stores that Redis has it, up to twice."""
    source = bot("a").record(a_snapshot())
    for crash in ("never", *crashes):
        one = bot("a")
        with monkeypatch.context() as patch, suppress(Crash):
            if crash == "before":
                patch.setattr(one.outbox.header, "begin_exchange", _crash)
            elif crash == "between":
                patch.setattr(copies, "_set_tokens", _crash)
            elif crash == "after":
                patch.setattr(one.outbox.header, "end_exchange", _crash)
            one.relay.sweep()
            assert crash == "never"
        one.close()
    last = bot("a")
    _sweep(last)
    _sweep(last)

    assert last.record(a_snapshot()) == source
    identity = last.outbox.header.read()
    assert (identity.token.encode(), identity.token in identity.other_tokens) == (redis.get(token_key(source)), False)


@pytest.mark.parametrize("crash", ["between", "after"])
def test_copies_made_while_the_token_is_exchanged_are_distinguished(
    bot: Callable[[str], Bot], monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    """Both copies have the old and the new token: the first one that exchanges it keeps the source."""
    original = bot("a")
    source = original.record(a_snapshot())
    _sweep(original)
    original.close()
    again = bot("a")
    with monkeypatch.context() as patch, suppress(Crash):
        if crash == "between":
            patch.setattr(copies, "_set_tokens", _crash)
        else:
            patch.setattr(again.outbox.header, "end_exchange", _crash)
        again.relay.sweep()
    again.close()
    _copy(original, "b")
    a, b = bot("a"), bot("b")
    _sweep(b, a, b, a)

    assert b.record(a_snapshot()) == source
    assert a.record(a_snapshot()) != source


def test_a_redis_that_lost_everything_gets_the_token_back_and_the_source_stays(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis
) -> None:
    """During a run and at the start of the next one. A copy that starts after that is still detected."""
    a = bot("a")
    source = a.record(a_snapshot())
    _sweep(a)
    redis.flushall()
    _sweep(a)
    assert redis.get(token_key(source)) == a.outbox.header.read().token.encode()
    assert redis.ttl(token_key(source)) > 29 * DAYS
    a.close()
    redis.flushall()
    _copy(a, "b")
    a = bot("a")
    _sweep(a)
    assert a.record(a_snapshot()) == source
    redis.flushall()
    _sweep(a)
    b = bot("b")
    _sweep(b)
    _sweep(a)

    assert a.record(a_snapshot()) == source
    assert b.record(a_snapshot()) != source


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("settled", [False, True])
def test_an_older_copy_that_was_put_back_gives_its_next_events_a_new_source(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis, tmp_path: Path, settled: bool
) -> None:
    """`cp` puts it back while no bot runs: the file keeps its inode, and its next numbers are already used."""
    worker = FakeWorker(redis, "history")
    one = bot("a")
    source = one.record(a_snapshot())
    if settled:
        _sweep(one)
        worker.work()
    _sweep(one)
    one.close()
    shutil.copyfile(one.path, tmp_path / "backup")
    inode = one.path.stat().st_ino
    one = bot("a")
    one.record(a_snapshot(after=timedelta(1)), a_snapshot(after=timedelta(2)))
    _sweep(one)
    worker.work()
    _sweep(one)
    assert {status.state for status in one.statuses()} == {"stored"}
    one.close()
    shutil.copyfile(tmp_path / "backup", one.path)
    assert one.path.stat().st_ino == inode

    restored = bot("a")
    assert restored.record(a_snapshot(after=timedelta(3))) == source  # no token has been compared yet
    _sweep(restored)
    new = restored.record(a_snapshot(after=timedelta(4)))
    _sweep(restored)
    outcomes = {answer.job_id: answer.outcome for answer in worker.work()}
    _sweep(restored)

    assert new != source
    assert [one.sequence for one in restored.accepted] == [2, 1]
    assert [(status.state, status.row_id) for status in restored.statuses()] == [("stored", 4), ("stored", 5)]
    assert sorted(outcome.kind for outcome in outcomes.values()) == ["duplicate"] * (not settled) + ["stored"] * 2
    assert restored.outbox.status().depth == 0


def test_one_of_two_copies_that_exchange_the_token_at_the_same_moment_keeps_the_source(
    bot: Callable[[str], Bot], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other copy exchanges it between this one's read and write: the write fails, and this one reads again."""
    original = bot("a")
    source = original.record(a_snapshot())
    original.close()
    _copy(original, "b")
    a, b = bot("a"), bot("b")
    begin_exchange = a.outbox.header.begin_exchange

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(a.outbox.header, "begin_exchange", begin_exchange)
        b.relay.sweep()
        return begin_exchange(*arguments)

    monkeypatch.setattr(a.outbox.header, "begin_exchange", meanwhile)
    a.relay.sweep()
    assert a.record(a_snapshot()) != source
    _sweep(b, a, b)
    assert b.record(a_snapshot()) == source


def test_a_relay_whose_exchange_fails_at_every_try_exchanges_the_token_at_its_next_check(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then, it keeps its source."""
    one = bot("a")
    source = one.record(a_snapshot())
    _sweep(one)
    before = redis.get(token_key(source))
    guard = copies.CopyGuard(one.outbox, redis)
    begin_exchange = one.outbox.header.begin_exchange

    def meanwhile(found: Collection[str], token: str) -> None:
        begin_exchange(found, token)
        redis.set(token_key(source), before or "")  # has no effect, but the transaction fails

    monkeypatch.setattr(one.outbox.header, "begin_exchange", meanwhile)
    guard.check()
    monkeypatch.undo()
    assert redis.get(token_key(source)) == before
    guard.check()
    assert redis.get(token_key(source)) == one.outbox.header.read().token.encode() != before
    assert one.record(a_snapshot()) == source


def test_a_relay_that_takes_its_lock_again_replaces_the_token_again(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis
) -> None:
    """Another relay may have relayed a copy of the outbox meanwhile."""
    one = bot("a")
    source = one.record(a_snapshot())
    guard, tokens = copies.CopyGuard(one.outbox, redis), []
    for begins in (True, False, True):
        if begins:
            guard.begin()
        guard.check()
        tokens.append(redis.get(token_key(source)))
    assert tokens[0] == tokens[1] != tokens[2]
    assert tokens[2] == one.outbox.header.read().token.encode()


def test_the_token_is_compared_every_five_seconds(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Redis has lost it meanwhile, it gets it back then."""
    clock = [1000.0]
    monkeypatch.setattr(copies, "_CHECK_SECONDS", 5.0)
    monkeypatch.setattr(copies, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    one = bot("a")
    source = one.record(a_snapshot())
    guard = copies.CopyGuard(one.outbox, redis)
    guard.check()
    for begin in (1000.0, 1005.0):
        redis.flushall()
        for moment, is_compared in ((begin + 0.1, False), (begin + 4.9, False), (begin + 5.0, True)):
            clock[0] = moment
            guard.check()
            assert redis.exists(token_key(source)) == is_compared


def test_sources_that_another_process_has_replaced_meanwhile_are_not_logged_again(
    bot: Callable[[str], Bot],
    redis: fakeredis.FakeRedis,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two processes use the copy."""
    original = bot("a")
    original.record(a_snapshot())
    _sweep(original)
    original.close()
    _copy(original, "b")
    _sweep(bot("a"))
    copy, other = bot("b"), bot("b")
    replace_sources = copy.outbox.header.replace_sources

    def after_the_other_one(sources: list[str]) -> list[str]:
        monkeypatch.undo()
        other.relay.sweep()
        return replace_sources(sources)

    monkeypatch.setattr(copy.outbox.header, "replace_sources", after_the_other_one)
    copies.CopyGuard(copy.outbox, redis).check()
    assert len([record for record in caplog.records if "was copied or restored" in record.getMessage()]) == 1
    assert [source.left_because for source in copy.outbox.sources()] == ["copied"]


def test_an_outbox_without_events_has_no_token_in_redis(bot: Callable[[str], Bot], redis: fakeredis.FakeRedis) -> None:
    """It has no source yet."""
    one = bot("a")
    _sweep(one, one)
    assert redis.keys() == []


def test_a_token_that_changes_at_every_try_is_exchanged_at_a_later_sweep(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others exchange it again and again meanwhile. Entries are sent all the same."""
    one = bot("a")
    source = one.record(a_snapshot())
    read = one.outbox.header.read

    def meanwhile() -> Any:
        redis.set(token_key(source), secrets.token_hex(8))
        return read()

    with monkeypatch.context() as others:
        others.setattr(one.outbox.header, "read", meanwhile)
        one.relay.sweep()
    assert one.record(a_snapshot(after=timedelta(1))) == source
    _sweep(one)

    assert one.record(a_snapshot(after=timedelta(2))) != source
    _sweep(one)
    assert one.outbox.status().sent == 3


def test_a_source_that_is_added_later_gets_a_token_at_the_next_sweep(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer with another name records into the same file while the relay has its lock."""
    monkeypatch.setattr(copies, "_CHECK_SECONDS", 1e9)
    original = bot("a")
    first = original.record(a_snapshot())
    _sweep(original)
    second = original.record(a_snapshot(), name="other")
    _sweep(original)
    token = original.outbox.header.read().token.encode()
    assert redis.mget(token_key(first), token_key(second)) == [token, token]
    original.close()
    _copy(original, "b")
    a, b = bot("a"), bot("b")
    _sweep(a, b)

    assert [a.record(a_snapshot(), name=name) for name in (NAME, "other")] == [first, second]
    assert {b.record(a_snapshot(), name=name) for name in (NAME, "other")} & {first, second} == set()


def test_a_copy_of_a_copy_gets_another_source(bot: Callable[[str], Bot]) -> None:
    """A third bot is made from the second one."""
    a = bot("a")
    a.record(a_snapshot())
    a.close()
    _copy(a, "b")
    a, b = bot("a"), bot("b")
    _sweep(a, b)
    b.record(a_snapshot())
    _sweep(b)
    b.close()
    _copy(b, "c")
    b, c = bot("b"), bot("c")
    _sweep(a, b, c, a, b, c)

    assert len({one.record(a_snapshot()) for one in (a, b, c)}) == 3


@pytest.mark.parametrize("stopped_in", ["begin_exchange", "end_exchange"])
def test_a_relay_that_resumes_after_another_one_took_over_is_not_taken_for_a_copy(
    bot: Callable[[str], Bot],
    redis: fakeredis.FakeRedis,
    monkeypatch: pytest.MonkeyPatch,
    stopped_in: str,
) -> None:
    """A relay process is stopped (SIGSTOP) while it exchanges the token, and continues later."""
    one = bot("a")
    source = one.record(a_snapshot())
    _sweep(one)
    one.close()
    stopped, other = bot("a"), bot("a")
    step = getattr(stopped.outbox.header, stopped_in)

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(stopped.outbox.header, stopped_in, step)
        copies.CopyGuard(other.outbox, redis).check()
        return step(*arguments)

    monkeypatch.setattr(stopped.outbox.header, stopped_in, meanwhile)
    _sweep(stopped, stopped)

    assert stopped.record(a_snapshot()) == source
    token = stopped.outbox.header.read().token.encode()
    assert token == redis.get(token_key(source))


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanges", "compares"])
def test_a_relay_that_reads_tokens_while_another_one_exchanges_them_is_not_taken_for_a_copy(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """The other relay exchanges the token between the two reads of this one: of the outbox and of Redis."""
    one = bot("a")
    source = one.record(a_snapshot())
    _sweep(one)
    read = one.outbox.header.read
    other = Outbox(one.path)

    def meanwhile() -> Any:
        monkeypatch.setattr(one.outbox.header, "read", read)
        before = read()
        copies.CopyGuard(other, redis).check()
        return read() if exchanges else before

    guard = copies.CopyGuard(one.outbox, redis)
    if not exchanges:
        guard.check()
    monkeypatch.setattr(one.outbox.header, "read", meanwhile)
    guard.check()
    guard.check()

    assert one.record(a_snapshot()) == source


def test_two_relays_that_exchange_the_token_at_the_same_moment_are_not_taken_for_copies(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have announced their tokens in the outbox when the first one writes its token to Redis."""
    source = bot("a").record(a_snapshot())
    _sweep(bot("a"))
    first, second = bot("a").outbox, bot("a").outbox
    first_has_begun, second_has_begun = threading.Event(), threading.Event()
    exchange = threading.Thread(target=copies.CopyGuard(first, redis).check)

    def announced(outbox: Outbox, then: Callable[[], None]) -> None:
        begin_exchange = outbox.header.begin_exchange

        def begun(found: Collection[str], token: str) -> None:
            begin_exchange(found, token)
            then()

        monkeypatch.setattr(outbox.header, "begin_exchange", begun)

    def wait_for_the_second_one() -> None:
        first_has_begun.set()
        assert second_has_begun.wait(10)

    def let_the_first_one_end() -> None:
        second_has_begun.set()
        exchange.join(10)

    announced(first, wait_for_the_second_one)
    announced(second, let_the_first_one_end)
    exchange.start()
    assert first_has_begun.wait(10)
    copies.CopyGuard(second, redis).check()

    assert not exchange.is_alive()
    assert second.append(NAME, [a_snapshot()])[0].source == source
    header = second.header.read()
    assert header.token.encode() == redis.get(token_key(source))


def test_the_earlier_token_and_those_of_other_exchanges_are_kept(tmp_path: Path) -> None:
    """Redis may lose its last writes, and another relay may put its token into Redis at any moment."""
    with Outbox(tmp_path / "outbox.db") as outbox:
        header, token = outbox.header, outbox.header.read().token
        for one in ("a", "b", "a"):
            header.begin_exchange({token}, one)
        header.end_exchange("b")
        header.end_exchange("unknown")
        assert (header.read().token, header.read().other_tokens) == ("b", ("a", token))


def test_a_header_has_the_newest_hundred_tokens_and_those_in_redis(tmp_path: Path) -> None:
    with Outbox(tmp_path / "outbox.db") as outbox:
        for number in range(105):
            outbox.header.begin_exchange({"3"}, str(number))
        assert outbox.header.read().other_tokens == ("3", *(str(number) for number in range(5, 105)))


def test_a_backup_made_while_a_relay_works_is_detected_when_it_is_restored(
    bot: Callable[[str], Bot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is replaced every minute."""
    one = bot("a")
    source = one.record(a_snapshot())
    _sweep(one)
    (tmp_path / "b").mkdir()
    with closing(sqlite3.connect(one.path)) as db, closing(sqlite3.connect(tmp_path / "b" / "outbox.db")) as backup:
        db.backup(backup)
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    _sweep(one)
    assert one.record(a_snapshot()) == source
    one.close()
    restored = bot("b")
    _sweep(restored)
    assert restored.record(a_snapshot()) != source


def test_a_redis_that_lost_its_last_writes_has_a_token_of_this_outbox(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis
) -> None:
    """A replica took over that had not received the last token."""
    one = bot("a")
    source = one.record(a_snapshot())
    _sweep(one)
    earlier = redis.get(token_key(source))
    one.close()
    again = bot("a")
    _sweep(again)
    redis.set(token_key(source), earlier or "")
    _sweep(again)
    assert again.record(a_snapshot()) == source


def test_sources_with_different_tokens_of_this_outbox_keep_their_names(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis
) -> None:
    """Redis has all tokens that the outbox knows: it lost the last write of one source only."""
    one = bot("a")
    sources = [one.record(a_snapshot(), name=name) for name in ("first", "second")]
    _sweep(one)
    header = one.outbox.header.read()
    for source, token in zip(sources, sorted(header.tokens), strict=True):
        redis.set(token_key(source), token)
    copies.CopyGuard(one.outbox, redis).check()
    assert [source.current for source in one.outbox.sources()] == [True, True]


def test_two_relays_of_a_copy_replace_its_source_once(bot: Callable[[str], Bot], redis: fakeredis.FakeRedis) -> None:
    """The second one saw the copied source before a producer took the new one."""
    original = bot("a")
    source = original.record(a_snapshot())
    _copy(original, "b")
    _sweep(original)
    copy = bot("b")
    guard = copies.CopyGuard(copy.outbox, redis)
    assert copy.outbox.header.replace_sources([source]) == [source]
    new = copy.record(a_snapshot())
    assert copy.outbox.header.replace_sources([source]) == []
    guard.check()
    assert copy.record(a_snapshot(after=timedelta(1))) == new != source


def test_an_exchange_without_an_answer_before_many_that_fail_is_not_taken_for_one_of_a_copy(
    bot: Callable[[str], Bot], redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has its token. Then Redis is full or read-only for a while."""
    one = bot("a")
    source = one.record(a_snapshot())
    with monkeypatch.context() as patch:
        patch.setattr(one.outbox.header, "end_exchange", _crash)
        with suppress(Crash):
            one.relay.sweep()
    with monkeypatch.context() as patch:
        patch.setattr(copies, "_set_tokens", _crash)
        for _ in range(30):
            with suppress(Crash):
                copies.CopyGuard(one.outbox, redis).check()
    copies.CopyGuard(one.outbox, redis).check()
    assert one.record(a_snapshot()) == source

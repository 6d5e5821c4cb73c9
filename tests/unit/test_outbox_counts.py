"""Counts and ages of an outbox agree with the states of its entries."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from producers.acknowledgements import Acknowledgement, Outcome
from producers.entries import Accepted
from producers.outbox import Outbox, Position
from tests.factories import a_snapshot

STORED = Outcome("stored", row_id=7)
REJECTED = Outcome("rejected", reason="no")
STATES = ["sent", "stored", "sent", "pending", "sent", "pending", "stored", "pending", "sent", "pending", "rejected"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    with Outbox(path) as opened:
        yield opened


def _settle(outbox: Outbox, one: Accepted, outcome: Outcome = STORED, resends: int = 1) -> None:
    found = Acknowledgement(one.source_id, one.sequence, one.nonce, None, outcome, at=0)
    outbox.deliveries.settle(one.source_id, resends, {0: found})


def _in_each_state(outbox: Outbox, last_sent: str = "sent") -> list[Accepted]:
    """Append entries of two producers, 1 and 2 in turn, and bring them into STATES, each in each way.

    The first five are sent in their order. The fifth one is in the state `last_sent`.
    """
    accepted = [outbox.append("bot", [a_snapshot(after=timedelta(n))], producer_id=1 + n % 2)[0] for n in range(11)]
    outbox.deliveries.mark_sent({entry.position: -1.0 for entry in outbox.deliveries.pending(1)})
    outbox.deliveries.mark_sent({entry.position: 100.0 for entry in outbox.deliveries.pending(4)})
    (checked,) = outbox.deliveries.overdue(9)
    outbox.deliveries.postpone({checked.position: 100.0})
    for n in (4, 8, 9, *([5] if last_sent == "pending" else [])):
        _settle(outbox, accepted[n - 1], resends=0)
    outbox.resend(since=0)
    outbox.deliveries.mark_sent({9: 100.0})
    for n in (2, 7, *([5] if last_sent == "stored" else [])):
        _settle(outbox, accepted[n - 1])
    _settle(outbox, accepted[10], REJECTED)
    return accepted


@pytest.mark.parametrize("last_sent", ["sent", "stored", "pending"])
def test_entries_up_to_each_position_are_counted_by_their_states(outbox: Outbox, last_sent: str) -> None:
    """Settled entries, and those to be sent again, are among them before and after the last one that was sent."""
    accepted = _in_each_state(outbox, last_sent)
    assert outbox.deliveries.prune(keep_seconds=60) == 0
    outbox.check_now(Position(4, outbox.generation))
    states = [status and status.state for status in outbox.statuses_of(accepted)]
    assert states == [*STATES[:4], last_sent, *STATES[5:]]
    for until in range(len(states) + 2):
        position = Position(until, outbox.generation)
        unsettled = [state in ("pending", "sent") for state in states[:until]]
        assert outbox.pending_count(position) == states[:until].count("pending")
        assert outbox.unsettled_count(until=position) == sum(unsettled)
        for producer_id in (1, 2):
            own = outbox.unsettled_count(producer_id=producer_id, until=position)
            assert own == sum(unsettled[producer_id - 1 :: 2])
    status = outbox.status()
    assert [status.pending, status.sent, status.stored, status.rejected] == [
        states.count(state) for state in ("pending", "sent", "stored", "rejected")
    ]


@pytest.mark.parametrize(("last_sent", "deleted"), [("sent", [2]), ("stored", [2, 5])])
def test_deleting_settled_entries_changes_no_other_count(outbox: Outbox, last_sent: str, deleted: list[int]) -> None:
    """Entries behind pending ones are not deleted yet: a gap among them would look like pending entries."""
    accepted = _in_each_state(outbox, last_sent)
    before = outbox.status()
    assert outbox.deliveries.prune(keep_seconds=-1) == len(deleted)
    assert [n for n, status in enumerate(outbox.statuses_of(accepted), 1) if status is None] == deleted
    after = outbox.status()
    assert (after.pending, after.sent, after.rejected) == (before.pending, before.sent, before.rejected)
    assert after.stored == before.stored - len(deleted)


def test_sent_entries_are_read_page_by_page_with_their_ages_and_checks(outbox: Outbox) -> None:
    """In the order of recording, however they were sent."""
    _in_each_state(outbox)
    expected = [(1, 2), (3, 1), (5, 1), (9, 1)]
    for limit in range(1, 6):
        found: list[tuple[int, int]] = []
        while page := outbox.deliveries.sent(found[-1][0] if found else 0, limit):
            assert len(page) <= limit
            assert all(0 <= age < 600 for _, age in page)
            found += [(head.position, head.checks) for head, _ in page]
        assert found == expected
    assert len(outbox.deliveries.sent(0, 3)) == 3


@pytest.mark.parametrize("last_sent", ["sent", "stored", "pending"])
def test_the_oldest_entry_is_the_first_one_in_its_state(outbox: Outbox, path: Path, last_sent: str) -> None:
    """However it came into that state."""
    accepted = _in_each_state(outbox, last_sent)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE entries SET recorded_at = recorded_at - 1000 * (20 - position)")

    def ages(*states: str) -> list[int]:
        statuses = outbox.statuses_of(accepted)
        return [20 - n for n, status in enumerate(statuses, 1) if status and status.state in states]

    while unsettled := ages("pending", "sent"):
        pending, oldest = outbox.oldest_pending_seconds(), outbox.status().oldest_unsettled_seconds
        assert oldest is not None
        assert oldest // 1000 == max(unsettled)
        assert (pending and pending // 1000) == max(ages("pending"), default=None)
        _settle(outbox, accepted[20 - max(unsettled) - 1])
    assert outbox.oldest_pending_seconds() is outbox.status().oldest_unsettled_seconds is None

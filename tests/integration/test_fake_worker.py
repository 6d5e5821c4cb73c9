"""The worker of the test fixture gives the same outcomes as a real worker."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from redis import Redis

from producers.errors import EventRejected
from producers.events import Payload
from producers.history_producer import HistoryProducer, Receipt
from producers.outbox import Outbox
from producers.testing import FakeHistory
from tests.factories import a_signal, a_snapshot, an_archive

EVENTS: list[Payload] = [
    a_snapshot(),
    an_archive(),
    a_snapshot(after=timedelta(seconds=1), portfolio_id=None),
    a_snapshot(),
    a_snapshot(balance=1),
    an_archive(signals=[a_signal(), a_signal(market_id="514006", amount=120.0)]),
    an_archive(signals=[a_signal()]),
]


def _outcomes(receipts: list[Receipt]) -> list[int | str]:
    """Return the row id or the reason of each receipt."""
    outcomes: list[int | str] = []
    for receipt in receipts:
        try:
            outcomes.append(receipt.wait(10))
        except EventRejected as rejected:
            outcomes.append(rejected.reason)
    return outcomes


def test_the_fake_worker_gives_the_same_outcomes_as_a_real_one(
    redis: Redis, database_url: str, work: Callable[[], None], tmp_path: Path
) -> None:
    """Row ids and reasons are equal for new events, duplicates and conflicts in both tables."""
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        receipts = producer.record_many(EVENTS)
        producer.flush(10)
        work()
        real = _outcomes(receipts)
    with FakeHistory() as history:
        receipts = history.producer.record_many(EVENTS)
        history.work()
        assert _outcomes(receipts) == real
    assert real[:4] == [1, 1, 2, 1]
    assert [type(outcome) for outcome in real[4:]] == [str, int, str]
    assert Outbox(tmp_path / "outbox.db").status().depth == 0

"""The worker that other people's tests get says what the real one says."""

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


def _ends(receipts: list[Receipt]) -> list[int | str]:
    """The row's id, or the reason."""
    ends: list[int | str] = []
    for receipt in receipts:
        try:
            ends.append(receipt.wait(10))
        except EventRejected as rejected:
            ends.append(rejected.reason)
    return ends


def test_the_fake_worker_answers_as_a_real_one(
    redis: Redis, database_url: str, work: Callable[[], None], tmp_path: Path
) -> None:
    """Stored, repeated, repeated with other content, in both tables: the same row ids and the same reasons."""
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        receipts = producer.record_many(EVENTS)
        producer.flush(10)
        work()
        real = _ends(receipts)
    with FakeHistory() as history:
        receipts = history.producer.record_many(EVENTS)
        history.work()
        assert _ends(receipts) == real
    assert real[:4] == [1, 1, 2, 1]
    assert [type(end) for end in real[4:]] == [str, int, str]
    assert Outbox(tmp_path / "outbox.db").status().depth == 0

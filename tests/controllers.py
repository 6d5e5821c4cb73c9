"""Controllers that remember every event they got a receipt for, and a judge that compares that with the database.

The judge compares identity and content: an accepted event is the row of its event id with its own content, or a
rejection recorded for its own delivery with its own content.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from redis import Redis
from sqlalchemy import text
from typer.testing import CliRunner, Result

from consumers.cli import app
from consumers.db.engine import get_db
from producers.errors import EventRejected, OutboxError
from producers.events import KINDS, Payload, SignalArchive, decode
from producers.history_producer import HistoryProducer, Receipt
from producers.outbox import Outbox
from tests.factories import a_snapshot, an_archive
from tests.faults.proxy import Proxy
from tests.rq_programs import until

_LOST = "is neither a row nor a rejection"
ROOT = Path(__file__).parents[1]
Content = tuple[Any, ...]
Key = tuple[str, int, UUID]  # source, sequence and event id of one accepted event

_ROWS = text("""
    SELECT id, event_id, source, portfolio_id, "timestamp", balance, total_invested, total_profit_loss, total_value,
        open_positions, trade_count, NULL AS signals FROM portfolio_history
    UNION ALL SELECT id, event_id, source, portfolio_id, archived_at, 0, 0, 0, 0, 0, 0, signals_data
    FROM signal_archives
""")
_REJECTIONS = text("SELECT source, sequence, event_id, event FROM event_outcomes WHERE outcome = 'rejected'")


def content_of(payload: Payload) -> Content:
    """By value: two payloads with the same content have the same."""
    fields, instant = dict(payload), payload.instant.astimezone(UTC)
    if isinstance(payload, SignalArchive):
        return ("archive", payload.portfolio_id, instant, _plain(payload.signals))
    amounts = ("balance", "total_invested", "total_profit_loss", "total_value", "open_positions", "trade_count")
    return ("snapshot", fields["portfolio_id"], instant, *(fields[name] for name in amounts))


def _plain(signals: Any) -> str:
    return json.dumps(signals, sort_keys=True, default=float)


def _content_of_row(row: Any) -> Content:
    if row.signals is not None:
        return ("archive", row.portfolio_id, row.timestamp.astimezone(UTC), _plain(row.signals))
    return ("snapshot", row.portfolio_id, row.timestamp.astimezone(UTC), *row[5:11])


@dataclass
class Account:
    """What one controller was given receipts for: by source, number and event id the payload, and what they say."""

    name: str
    accepted: dict[Key, Payload]
    states: dict[Key, tuple[str, int | None]]  # state and row id, of those that can still be asked


class Controller:
    """A producer in this process on the outbox at `path`."""

    def __init__(self, path: Path, redis: Redis | None = None) -> None:
        self.path = path
        self._redis = redis
        self.producer = HistoryProducer(redis, outbox=path)
        self.accepted: dict[Key, Payload] = {}
        self._receipts: dict[Key, Receipt] = {}

    def record(self, *payloads: Payload) -> list[Receipt]:
        receipts = [self.producer.record(payload) for payload in payloads]
        for receipt, payload in zip(receipts, payloads, strict=True):
            key = (receipt.source, receipt.sequence, receipt.event_id)
            self.accepted[key], self._receipts[key] = payload, receipt
        return receipts

    def restart(self) -> None:
        """As a bot does: what it was given receipts for before cannot be asked any more."""
        self.stop()
        self._receipts = {}
        self.producer = HistoryProducer(self._redis, outbox=self.path)

    def stop(self) -> None:
        self.producer.close(0)

    def account(self) -> Account:
        return Account(self.path.parent.name, self.accepted, {key: _fate(one) for key, one in self._receipts.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _fate(receipt: Receipt) -> tuple[str, int | None]:
    try:
        return receipt.state, receipt.wait(0)
    except (EventRejected, TimeoutError):
        return receipt.state, None
    except OutboxError as error:
        return f"unknown: {error}", None


def settle(*controllers: Controller, seconds: float = 30.0) -> None:
    """Wait until each entry of each outbox is stored or rejected; entries that are under way are asked for at once."""
    for one in controllers:
        assert one.producer.settle(seconds) == 0, f"{one.path}: {one.producer.status()}"


def lost(account: Account) -> set[Key]:
    """Events of a controller that are neither a row nor a rejection, for a test that expects some."""
    return {key for breach, key in _breaches([account]) if key is not None and breach.endswith(_LOST)}


def breaches(accounts: Iterable[Account]) -> list[str]:
    """Every breach of the promise, as a sentence. Empty: each accepted event is one row or one rejection of its own."""
    return [breach for breach, _ in _breaches(list(accounts))]


def _breaches(accounts: list[Account]) -> list[tuple[str, Key | None]]:
    """Each with the event that it is about."""
    with get_db() as db:
        rows = [(row.id, row.event_id, _content_of_row(row)) for row in db.execute(_ROWS)]
        # Copies may use one number for the same event id, each with a content of its own.
        refused = {((r.source, r.sequence, r.event_id), _content_of_event(r.event)) for r in db.execute(_REJECTIONS)}
    contents = {event_id: (row_id, content) for row_id, event_id, content in rows}
    found: list[tuple[str, Key | None]] = []
    if len(contents) < len(rows):
        found.append(("an event id has two rows", None))
    known = {(payload.event_id, content_of(payload)) for one in accounts for payload in one.accepted.values()}
    found += [(f"row {row_id} is nobody's", None) for row_id, *row in rows if tuple(row) not in known]
    for one in accounts:
        for key, payload in one.accepted.items():
            row_id, content = contents.get(payload.event_id, (None, None))
            is_stored = content == content_of(payload)
            is_rejected = (key, content_of(payload)) in refused
            if not (is_stored or is_rejected):
                found.append((f"{one.name}: {key} {payload.summary} {_LOST}", key))
            if is_stored and is_rejected:
                found.append((f"{one.name}: {key} is a row and a rejection", key))
            wanted = ("stored", row_id) if is_stored else ("rejected", None)
            if key in one.states and one.states[key] != wanted:
                found.append((f"{one.name}: the receipt of {key} says {one.states[key]}, and it is {wanted}", key))
    return found


def _content_of_event(event: str) -> Content:
    return content_of(decode(event, KINDS[json.loads(event)["type"]].model).data)


def cli(*arguments: str, outbox: Path | None = None) -> Result:
    """Run `trading-history` in this process, with HISTORY_OUTBOX set to `outbox` or to a place without one."""
    named = {"HISTORY_OUTBOX": str(outbox or Path("no-outbox-here.db").absolute()), "COLUMNS": "400"}
    return CliRunner().invoke(app, arguments, env=named)


def audited(outbox: Path | None) -> tuple[int, list[dict[str, Any]]]:
    """Exit status of `audit`, and what it says of each source."""
    run = cli("audit", "--json", outbox=outbox)
    return run.exit_code, json.loads(run.stdout)


def doctored(outbox: Path, name: str) -> tuple[str, str]:
    """Status and finding of one check of `doctor`."""
    checks = json.loads(cli("doctor", "--json", outbox=outbox).stdout)
    (found,) = [(one["status"], one["found"]) for one in checks if one["name"] == name]
    return found


def assert_sound(*accounts: Account, outboxes: Sequence[Path]) -> None:
    """No breach, and `audit` finds nothing missing: with each of the outboxes, and without any."""
    found = breaches(accounts)
    assert not found, "\n".join(found)
    for outbox in (*outboxes, None):
        status, sources = audited(outbox)
        assert (status, [one for one in sources if one["missing"] or one["mismatched"]]) == (0, []), outbox


def copy_with_cp(*names: object) -> None:
    """By a process of its own: closing a file ends all locks that this process has on it."""
    subprocess.run(["cp", "-a", *map(str, names)], check=True)


class Bot:
    """A producer in a process of its own, which records when it is told to. It can be killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.accepted: dict[Key, Payload] = {}
        self.log = path.parent.with_name(f"{path.parent.name}.log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOT, f"{path.parent.name}/{path.name}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=path.parent.parent,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def record(self, portfolio: int, first: int, count: int, balance: int = 100) -> None:
        """Snapshots of this portfolio at consecutive seconds, from `first`."""
        for source, sequence, number in self._ask("record", portfolio, first, count, balance):
            payload = a_snapshot(after=timedelta(seconds=number), portfolio_id=portfolio, balance=balance)
            self.accepted[(source, sequence, payload.event_id)] = payload

    def settle(self, seconds: float = 30) -> None:
        assert self._ask("settle", seconds) == 0

    def states(self) -> dict[Key, tuple[str, int | None]]:
        return {(source, n, UUID(event)): (state, row) for source, n, event, state, row in self._ask("states")}

    def account(self, *, ask: bool = True) -> Account:
        return Account(self.path.parent.name, self.accepted, self.states() if ask else {})

    def _ask(self, *words: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self._end()

    def stop(self) -> None:
        """It closes its producer."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._end()

    def _end(self) -> None:
        self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


_BOT = """
import json, sys
from datetime import timedelta
from producers.errors import EventRejected, HistoryError
from producers.history_producer import HistoryProducer
from tests.factories import a_snapshot

receipts = []

def record(portfolio, first, count, balance):
    done = []
    for number in range(first, first + count):
        snapshot = a_snapshot(after=timedelta(seconds=number), portfolio_id=portfolio, balance=balance)
        receipts.append(producer.record(snapshot))
        done.append((receipts[-1].source, receipts[-1].sequence, number))
    return done

def fate(receipt):
    try:
        return receipt.state, receipt.wait(0)
    except (EventRejected, TimeoutError):
        return receipt.state, None

def states():
    return [(one.source, one.sequence, str(one.event_id), *fate(one)) for one in receipts]

with HistoryProducer(outbox=sys.argv[1]) as producer:
    for line in sys.stdin:
        name, *words = json.loads(line)
        print(json.dumps({"record": record, "states": states, "settle": producer.settle}[name](*words)), flush=True)
"""


@contextmanager
def worker_process(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`trading-history worker`, on the real servers and not through a proxy; killed at the end of the block."""
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "consumers.cli", "worker"],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Line:
    """The way to Redis, which can be cut: clients of REDIS_URL lead through it."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def cut(self) -> None:
        self._proxy.set_mode("refuse")
        self._proxy.cut()

    def restore(self) -> None:
        self._proxy.set_mode("pass")


def some_events(portfolio: int, first: int, count: int, **overrides: Any) -> list[Payload]:
    """Snapshots at consecutive seconds from `first`, and one archive at the first of these."""
    at = [timedelta(seconds=number) for number in range(first, first + count)]
    archive = an_archive(after=at[0], portfolio_id=portfolio)
    return [*(a_snapshot(after=after, portfolio_id=portfolio, **overrides) for after in at), archive]


def is_settled(path: Path) -> bool:
    with Outbox(path) as outbox:
        return outbox.status().depth == 0


def wait_until_settled(path: Path, seconds: float = 30.0) -> None:
    until(lambda: is_settled(path), seconds)

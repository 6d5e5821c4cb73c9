"""Controllers that keep a list of the events they have recorded, and functions that compare it with the database.

The comparison is by id and content: each accepted event is either the row of its event id, with the same content, or a
rejection of its delivery, with the same content.
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
from tests.rq_programs import end, until

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
    """Return the content of a payload for comparison by value."""
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
    """The events that one controller has recorded, and the states of their receipts."""

    name: str
    accepted: dict[Key, Payload]
    states: dict[Key, tuple[str, int | None]]  # state and row id of the receipts that still exist


class Controller:
    """A producer in this process with the outbox at `path`."""

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
        """Make a new producer, as a restarted bot does. The receipts of the old one no longer exist."""
        self.stop()
        self._receipts = {}
        self.producer = HistoryProducer(self._redis, outbox=self.path)

    def stop(self) -> None:
        self.producer.close(0)

    def account(self) -> Account:
        return Account(
            self.path.parent.name, self.accepted, {key: _outcome(one) for key, one in self._receipts.items()}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _outcome(receipt: Receipt) -> tuple[str, int | None]:
    try:
        return receipt.state, receipt.wait(0)
    except (EventRejected, TimeoutError):
        return receipt.state, None
    except OutboxError as error:
        return f"unknown: {error}", None


def settle(*controllers: Controller, seconds: float = 30.0) -> None:
    """Wait until all entries of all outboxes are settled. Check the jobs of sent entries at once."""
    for one in controllers:
        assert one.producer.settle(seconds) == 0, f"{one.path}: {one.producer.status()}"


def lost(account: Account) -> set[Key]:
    """Return the events of a controller that are neither a row nor a rejection."""
    return {key for breach, key in _breaches([account]) if key is not None and breach.endswith(_LOST)}


def breaches(accounts: Iterable[Account]) -> list[str]:
    """Return a sentence for each event that is not exactly one row or one rejection."""
    return [breach for breach, _ in _breaches(list(accounts))]


def _breaches(accounts: list[Account]) -> list[tuple[str, Key | None]]:
    """Return each breach with its event, if it concerns one."""
    with get_db() as db:
        rows = [(row.id, row.event_id, _content_of_row(row)) for row in db.execute(_ROWS)]
        # Two copies of an outbox may use the same number and event id with different contents.
        rejected = {((r.source, r.sequence, r.event_id), _content_of_event(r.event)) for r in db.execute(_REJECTIONS)}
    contents = {event_id: (row_id, content) for row_id, event_id, content in rows}
    found: list[tuple[str, Key | None]] = []
    if len(contents) < len(rows):
        found.append(("an event id has two rows", None))
    known = {(payload.event_id, content_of(payload)) for one in accounts for payload in one.accepted.values()}
    found += [(f"row {row_id} is not an accepted event", None) for row_id, *row in rows if tuple(row) not in known]
    for one in accounts:
        for key, payload in one.accepted.items():
            row_id, content = contents.get(payload.event_id, (None, None))
            is_stored = content == content_of(payload)
            is_rejected = (key, content_of(payload)) in rejected
            if not (is_stored or is_rejected):
                found.append((f"{one.name}: {key} {payload.summary} {_LOST}", key))
            if is_stored and is_rejected:
                found.append((f"{one.name}: {key} is a row and a rejection", key))
            wanted = ("stored", row_id) if is_stored else ("rejected", None)
            if key in one.states and one.states[key] != wanted:
                found.append((f"{one.name}: the receipt of {key} has {one.states[key]} instead of {wanted}", key))
    return found


def _content_of_event(event: str) -> Content:
    return content_of(decode(event, KINDS[json.loads(event)["type"]].model).data)


def cli(*arguments: str, outbox: Path | None = None) -> Result:
    """Run `trading-history` in this process. HISTORY_OUTBOX is `outbox`, or a path without a file."""
    named = {"HISTORY_OUTBOX": str(outbox or Path("no-outbox-here.db").absolute()), "COLUMNS": "400"}
    return CliRunner().invoke(app, arguments, env=named)


def audited(outbox: Path | None) -> tuple[int, list[dict[str, Any]]]:
    """Return the exit status of `audit` and its result for each source."""
    run = cli("audit", "--json", outbox=outbox)
    return run.exit_code, json.loads(run.stdout)


def doctored(outbox: Path, name: str) -> tuple[str, str]:
    """Return the status and the finding of one check of `doctor`."""
    checks = json.loads(cli("doctor", "--json", outbox=outbox).stdout)
    (found,) = [(one["status"], one["found"]) for one in checks if one["name"] == name]
    return found


def assert_sound(*accounts: Account, outboxes: Sequence[Path]) -> None:
    """Assert that there is no breach, and that `audit` finds nothing missing, with each outbox and without any."""
    found = breaches(accounts)
    assert not found, "\n".join(found)
    for outbox in (*outboxes, None):
        status, sources = audited(outbox)
        assert (status, [one for one in sources if one["missing"] or one["mismatched"]]) == (0, []), outbox


def copy_with_cp(*names: object) -> None:
    """Copy files in a separate process: closing a file in this process would release its locks on the file."""
    subprocess.run(["cp", "-a", *map(str, names)], check=True)


class Bot:
    """A producer in a separate process that records on request and can be killed."""

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
        """Record snapshots of this portfolio, one per second, the first at `first` seconds."""
        for source, sequence, number in self._call("record", portfolio, first, count, balance):
            payload = a_snapshot(after=timedelta(seconds=number), portfolio_id=portfolio, balance=balance)
            self.accepted[(source, sequence, payload.event_id)] = payload

    def settle(self, seconds: float = 30) -> None:
        assert self._call("settle", seconds) == 0

    def states(self) -> dict[Key, tuple[str, int | None]]:
        return {(source, n, UUID(event)): (state, row) for source, n, event, state, row in self._call("states")}

    def account(self, *, ask: bool = True) -> Account:
        return Account(self.path.parent.name, self.accepted, self.states() if ask else {})

    def _call(self, *words: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self._end()

    def stop(self) -> None:
        """End the process, which closes its producer."""
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

def outcome(receipt):
    try:
        return receipt.state, receipt.wait(0)
    except (EventRejected, TimeoutError):
        return receipt.state, None

def states():
    return [(one.source, one.sequence, str(one.event_id), *outcome(one)) for one in receipts]

with HistoryProducer(outbox=sys.argv[1]) as producer:
    for line in sys.stdin:
        name, *words = json.loads(line)
        print(json.dumps({"record": record, "states": states, "settle": producer.settle}[name](*words)), flush=True)
"""


@contextmanager
def worker_process(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `trading-history worker` on the real servers, without a proxy. It ends with the block."""
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
        end(process)


class Line:
    """The connection to Redis that clients of REDIS_URL use. A test can cut it."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def cut(self) -> None:
        self._proxy.set_mode("refuse")
        self._proxy.cut()

    def restore(self) -> None:
        self._proxy.set_mode("pass")


def some_events(portfolio: int, first: int, count: int, **overrides: Any) -> list[Payload]:
    """Return snapshots, one per second, the first at `first` seconds, and one archive at that time."""
    at = [timedelta(seconds=number) for number in range(first, first + count)]
    archive = an_archive(after=at[0], portfolio_id=portfolio)
    return [*(a_snapshot(after=after, portfolio_id=portfolio, **overrides) for after in at), archive]


def is_settled(path: Path) -> bool:
    with Outbox(path) as outbox:
        return outbox.status().depth == 0


def wait_until_settled(path: Path, seconds: float = 30.0) -> None:
    until(lambda: is_settled(path), seconds)

"""`trading-history demo`: record three months of simulated trading cycles twice, and count the rows."""

from __future__ import annotations

import fcntl
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import text

from consumers.db.engine import engine, translated_errors
from consumers.db.row_counts import exact_counts
from consumers.db.schema import apply_schema
from consumers.demo.cycle import DAYS, PORTFOLIO_IDS, cycles
from consumers.embedded.child_processes import worker_process
from consumers.embedded.stack import embedded_stack
from consumers.operations import get_portfolio_history, get_recent_signal_archives
from consumers.terminal import print_archives, print_snapshots
from producers.errors import HistoryError
from producers.history_producer import HistoryProducer, Receipt
from producers.settings import TransportSettings
from producers.trading_controller import archive_current_signals, create_daily_portfolio_snapshot

_OUTBOX = "outbox.db"

_SERVER = text("SELECT current_setting('server_version')")


def run_demo(
    home: Path,
    show_page: Callable[[Path], None] | None = None,
    *,
    wait_seconds: float = 40.0,
    lock_seconds: float = 5.0,
) -> int:
    """Run the demo in `home` and replace the data of an earlier run. Return the exit status, 1 if a count is wrong.

    If the counts are right, call `show_page` with the path of the outbox, while servers and worker still run.

    Raises:
        HistoryError: the events of a pass were not stored within `wait_seconds`; or another demo, or the worker of a
            killed one, still had the folder's lock after `lock_seconds`.
    """
    with _locked(home, lock_seconds) as lock, embedded_stack(home):
        _start_empty(home)
        print(f"{len(PORTFOLIO_IDS)} portfolios, {DAYS} days, one trading cycle per day: a snapshot and an archive\n")
        with worker_process(home / "worker.log", keep=[lock]):
            first = _run_pass(home, "recorded", wait_seconds)
            second = _run_pass(home, "recorded again", wait_seconds)
            is_right = _print_result(first, second)
            if is_right:
                _print_next_commands(home)
                if show_page is not None:
                    sys.stdout.flush()
                    show_page(home / _OUTBOX)
    return 0 if is_right else 1


def _print_result(first: list[int], second: list[int]) -> bool:
    """Print the counts and the newest rows, and return whether all counts are right."""
    expected = 2 * DAYS * len(PORTFOLIO_IDS)
    counts = exact_counts()
    stored = counts["portfolio_snapshots"] + counts["signal_archives"]
    print(f"\n{stored} rows: {counts['portfolio_snapshots']} snapshots, {counts['signal_archives']} archives")
    print(f"{counts['duplicate']} duplicates, {counts['rejected']} rejected events\n")
    print("Newest rows of portfolio_history:")
    print_snapshots(get_portfolio_history(4))
    print("\nNewest rows of signal_archives:")
    print_archives(get_recent_signal_archives(4))
    is_right = (
        first == second
        and len(first) == stored == counts["duplicate"] == expected
        and counts["portfolio_snapshots"] == counts["signal_archives"]
        and counts["rejected"] == 0
    )
    if not is_right:
        print(f"\nWrong count: {expected} rows and {expected} duplicates were expected.", file=sys.stderr)
    return is_right


def _print_next_commands(home: Path) -> None:
    program = shlex.quote(sys.argv[0])
    if Path(sys.argv[0]).name == "__main__.py":  # python -m consumers.cli
        program = f"{shlex.quote(sys.executable)} -m consumers.cli"
    on_data = f"HISTORY_HOME={shlex.quote(str(home))} {program}"
    print("\nAll counts are right: every event was recorded twice and stored once.")
    print(f"\nThe data stays in {home}. To list more of it:\n  {on_data} history --portfolio-id 1")
    print(f"To start the pipeline for your own controller, with other data:\n  {program} up")
    print(f"To open the history page on the data:\n  {on_data} api")


def _run_pass(home: Path, label: str, wait_seconds: float) -> list[int]:
    """Record every cycle and wait until all events are stored. Return their row ids, in the order of recording."""
    started = time.monotonic()
    deadline = started + wait_seconds
    with HistoryProducer(outbox=home / _OUTBOX) as producer:
        receipts: list[Receipt] = []
        for cycle in cycles():
            receipts.append(
                create_daily_portfolio_snapshot(
                    cycle.portfolio, cycle.portfolio_id, timestamp=cycle.at, producer=producer
                )
            )
            archived = archive_current_signals(
                cycle.signals, portfolio_id=cycle.portfolio_id, archived_at=cycle.at, producer=producer
            )
            assert archived is not None  # each cycle has signals
            receipts.append(archived)
        recorded = time.monotonic() - started
        row_ids = [_row_id(receipt, deadline) for receipt in receipts]
    seconds = time.monotonic() - started
    print(
        f"{len(receipts)} events {label}: accepted in {recorded:.2f} s,"
        f" all acknowledged after {seconds:.2f} s ({len(receipts) / seconds:,.0f} events/s)"
    )
    return row_ids


def _row_id(receipt: Receipt, deadline: float) -> int:
    try:
        return receipt.wait(max(0.0, deadline - time.monotonic()))
    except TimeoutError as error:
        raise HistoryError(f"{error}; see the worker's log in the demo's folder") from None


def _start_empty(home: Path) -> None:
    """Empty the database and Redis and delete the outbox. They are the embedded servers in the demo's own folder."""
    with translated_errors(engine()), engine().begin() as db:
        db.exec_driver_sql(
            "DROP TABLE IF EXISTS portfolio_history, signal_archives, event_outcomes, withdrawals CASCADE"
        )
        version = db.execute(_SERVER).scalar()
    apply_schema(engine())
    redis = TransportSettings.from_environment().redis()
    redis.flushall()
    print(f"PostgreSQL {version}, Valkey {redis.info('server')['valkey_version']}, one worker process")
    for leftover in home.glob(f"{_OUTBOX}*"):
        leftover.unlink()


@contextmanager
def _locked(home: Path, seconds: float) -> Iterator[int]:
    """Lock the folder and yield the lock's file descriptor.

    The worker inherits it, so that the lock of a killed demo lasts until its worker has ended.
    """
    home.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with open(home / "demo.lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HistoryError(f"another demo is running in {home}: wait until it ends") from None
                time.sleep(0.05)
        yield lock.fileno()

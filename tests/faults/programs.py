"""Programs that the fault tests run as processes: `python -m tests.faults.programs PROGRAM …`.

If FAULT_STEP is set, a program kills itself with SIGKILL when it reaches that step for the FAULT_TIMES-th time. If
FAULT_FILE_BYTES is set, none of its files can grow beyond that size.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from producers import copies, entry_sender, outbox, outbox_carry_over, outbox_salvage, rq_queue
from producers.acknowledgement_reader import AcknowledgementReader
from producers.entry_sender import EntrySender
from producers.errors import EventRejected, OutboxError
from producers.events import PortfolioSnapshot, SignalArchive
from producers.history_producer import HistoryProducer, Receipt
from producers.outbox import Outbox
from producers.outbox_deliveries import OutboxDeliveries
from producers.outbox_file import OutboxFile
from producers.outbox_header import OutboxHeader
from tests.factories import a_signal, a_snapshot, an_archive
from tests.faults.accepted import AcceptedFile, Answer, Delivery, delivery_of_receipt

# A producer of the storm sends mostly new events, some that others send too, and some in conflict.
_SHARED_FACTS = 40
_MOST_UNSETTLED = 1000
_ANSWERED_EVERY = 10  # it checks the receipt of every tenth event


def produce(options: argparse.Namespace) -> None:
    """Run as a long-running controller: record `count` events and write each accepted one to a file.

    After every `settle_every` events, wait until they are settled, so that each step is reached that often. From
    SIGUSR1 until SIGUSR2, record nothing. After `move_after` events, rename the outbox.
    """
    pause, dice = _Pause(), random.Random(options.seed)
    file = AcceptedFile(options.accepted)
    waiting: list[tuple[Receipt, Delivery]] = []
    with HistoryProducer(outbox=options.outbox, name=options.name) as producer:
        for number in range(options.first, options.first + options.count):
            while pause.requested:
                time.sleep(0.05)
            payload = _payload(options.seed, number, options.variant)
            receipt = producer.record(payload)
            delivery = delivery_of_receipt(receipt, payload)
            file.write(delivery)
            if number % _ANSWERED_EVERY == 0:
                waiting.append((receipt, delivery))
            waiting = [one for one in waiting if not _write_answer(file, *one)]
            time.sleep(options.pause * dice.random())
            while number % 50 == 0 and producer.status().depth > _MOST_UNSETTLED:
                time.sleep(0.1)  # the backlog must be drained before the run can be judged
            if options.settle_every and (number + 1) % options.settle_every == 0:
                _wait_until_settled(producer)
            if options.move_after == number + 1:
                _move_away(options.outbox)
        producer.flush(30)


class _Pause:
    """Pause of this controller, requested by SIGUSR1 and ended by SIGUSR2."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGUSR1, lambda *_: self._set(requested=True))
        signal.signal(signal.SIGUSR2, lambda *_: self._set(requested=False))

    def _set(self, *, requested: bool) -> None:
        self.requested = requested


def record_one(options: argparse.Namespace) -> None:
    """Run as a controller that cron starts: record one event and exit in one of three ways."""
    file = AcceptedFile(options.accepted)
    producer = HistoryProducer(outbox=options.outbox, name=options.name)
    payload = a_snapshot(portfolio_id=options.seed)
    file.write(delivery_of_receipt(producer.record(payload), payload))
    end = random.Random(options.seed).choice(["close", "return", "_exit"])
    if end == "close":
        producer.close()
    elif end == "_exit":
        os._exit(0)


def report(options: argparse.Namespace) -> None:
    """Run as a controller that reports its portfolio: record `count` snapshots of now, or `late` seconds old.

    At the end, return, or with `--end kill` end like a controller that is killed as soon as it has recorded.
    """
    dice, file = random.Random(options.seed), AcceptedFile(options.accepted)
    producer = HistoryProducer(outbox=options.outbox, name=options.name)
    for number in range(options.count):
        at = datetime.now(UTC) - timedelta(seconds=options.late)
        balance = f"{dice.randrange(10**6) / 100:.2f}"
        payload = a_snapshot(timestamp=at, snapshot_date=at.date(), balance=balance, portfolio_id=options.portfolio)
        file.write(delivery_of_receipt(producer.record(payload), payload))
        if number + 1 < options.count:
            time.sleep(options.pause * dice.random())
    if options.end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def _write_answer(file: AcceptedFile, receipt: Receipt, delivery: Delivery) -> bool:
    """Write the event's outcome to the file; return False if it is not known yet."""
    try:
        file.write(Answer(delivery.job_id, receipt.wait(0), None))
    except EventRejected as error:
        file.write(Answer(delivery.job_id, None, error.reason))
    except TimeoutError:
        return False
    except OutboxError:  # an older copy without this entry has replaced the file
        return True
    return True


def _move_away(outbox: Path) -> None:
    """Rename the outbox's files, like a deployment that keeps the old files under another name."""
    for end in ("", "-wal", "-shm"):
        file = outbox.with_name(outbox.name + end)
        if file.exists():
            file.rename(file.with_name(f"moved-{file.name}"))


def _wait_until_settled(producer: HistoryProducer) -> None:
    deadline = time.monotonic() + 30
    while producer.status().depth:
        if time.monotonic() > deadline:
            raise TimeoutError("the recorded events were not settled in 30 s")
        time.sleep(0.01)


def _payload(seed: int, number: int, variant: int) -> PortfolioSnapshot | SignalArchive:
    """Return mostly a new event of this seed. Another variant has the same events, half of them with other content."""
    dice = random.Random(f"{seed} {number}")
    shared, balance, kind = dice.random(), dice.choice([1, 1, 1, 2]), dice.random()
    if dice.random() < 0.5:
        variant = 0
    if shared < 0.1:
        fact = timedelta(days=1, seconds=dice.randrange(_SHARED_FACTS))
        return a_snapshot(after=fact, portfolio_id=0, balance=balance)
    after = timedelta(seconds=number)
    if kind < 0.2:
        signals = [a_signal(), a_signal(reason=f"{number} {variant}")]
        return an_archive(after=after, portfolio_id=seed, signals=signals)
    return a_snapshot(after=after, portfolio_id=seed, trade_count=variant)


def work() -> None:
    """Run `trading-history worker`; FAULT_BATCH limits the size of its batches."""
    from consumers.cli import app
    from consumers.worker import worker_thread

    worker_thread.BATCH_JOBS = int(os.environ.get("FAULT_BATCH", worker_thread.BATCH_JOBS))

    app(["worker"])


def relay_outboxes(outboxes: Sequence[Path]) -> None:
    """Run `trading-history relay` for these outboxes."""
    from consumers.cli import app

    app(["relay", *(part for path in outboxes for part in ("--outbox", str(path)))])


def serve_api(options: argparse.Namespace) -> None:
    """Run `trading-history api` for this outbox, as if outboxes had the limit `max_bytes`."""
    os.environ["HISTORY_OUTBOX"] = str(options.outbox)
    outbox.MAX_BYTES = options.max_bytes
    from consumers.cli import app

    app(["api", "--port", str(options.port)])


def _die_at(step: str, times: int) -> None:
    """Wrap the function of a step so that the process kills itself when it gets there for the `times`-th time."""
    left = times

    def die() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    owner, name, when = _STEPS[step]()
    original: Callable[..., Any] = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            die()
        result = original(*args, **kwargs)
        if when == "after":
            die()
        return result

    setattr(owner, name, dying)


def _in_worker(module: str, name: str, when: str) -> Callable[[], tuple[Any, str, str]]:
    def find() -> tuple[Any, str, str]:
        import importlib

        owner: Any = importlib.import_module(module)
        *path, function = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, function, when

    return find


PRODUCER_STEPS = {
    "before append": lambda: (Outbox, "append", "before"),
    "after append": lambda: (Outbox, "append", "after"),
    "before send": lambda: (EntrySender, "_send", "before"),
    "after send": lambda: (EntrySender, "_send", "after"),
    "after mark": lambda: (OutboxDeliveries, "mark_sent", "after"),
    "before settle": lambda: (OutboxDeliveries, "settle", "before"),
    "after settle": lambda: (OutboxDeliveries, "settle", "after"),
    "after removing acknowledgements": lambda: (AcknowledgementReader, "_remove", "after"),
}
# Steps of the exchange of the token with Redis, once each time a relay starts.
EXCHANGE_STEPS = {
    "before begin_exchange": lambda: (OutboxHeader, "begin_exchange", "before"),
    "after begin_exchange": lambda: (OutboxHeader, "begin_exchange", "after"),
    "after the commands for Redis": lambda: (copies, "_set_tokens", "after"),
    "before end_exchange": lambda: (OutboxHeader, "end_exchange", "before"),
    "after end_exchange": lambda: (OutboxHeader, "end_exchange", "after"),
}
# Steps of a producer whose outbox file is renamed while it is open.
CARRY_OVER_STEPS = {
    "before carry-over": lambda: (outbox_carry_over, "_carry_over", "before"),
    "after carry-over, before its commit": lambda: (outbox_carry_over, "_carry_over", "after"),
    "after the commit of carry-over": lambda: (OutboxFile, "_continue_at_path", "after"),
}
# Steps of a producer that finds its outbox file damaged.
QUARANTINE_STEPS = {
    "before quarantine": lambda: (OutboxFile, "quarantine", "before"),
    "before a rename": lambda: (Path, "rename", "before"),
    "after a rename": lambda: (Path, "rename", "after"),
    "after quarantine": lambda: (OutboxFile, "quarantine", "after"),
    "while salvaging": lambda: (outbox_salvage, "_entry_of", "before"),
    "before noting losses": lambda: (outbox_salvage, "_gaps", "before"),
}
WORKER_STEPS = {
    "before reserve": _in_worker("consumers.worker.reservations", "Reservations.reserve", "before"),
    "after reserve": _in_worker("consumers.worker.reservations", "Reservations.reserve", "after"),
    "before insert": _in_worker("consumers.worker.batch", "insert_events", "before"),
    "after insert": _in_worker("consumers.worker.batch", "insert_events", "after"),
    "after commit": _in_worker("consumers.worker.batch", "_process_together", "after"),
    "before completion": _in_worker("consumers.worker.completion", "Completion.complete", "before"),
    "after the script of completion": _in_worker("consumers.worker.completion", "Completion._run_script", "after"),
    "after completion": _in_worker("consumers.worker.completion", "Completion.complete", "after"),
    "before requeueing": _in_worker("consumers.worker.reservations", "Reservations.requeue", "before"),
}
_STEPS: dict[str, Callable[[], tuple[Any, str, str]]] = {
    **PRODUCER_STEPS,
    **EXCHANGE_STEPS,
    **CARRY_OVER_STEPS,
    **QUARANTINE_STEPS,
    **WORKER_STEPS,
}


def shorten_intervals() -> None:
    """Shorten the intervals at which overdue entries are checked, so that a run can be judged in time."""
    entry_sender._LAST_CHECK_SECONDS = 15.0
    rq_queue.TIMEOUT_SECONDS = 30  # time for which the job of a dead stock worker counts as started


def main() -> None:
    shorten_intervals()
    if limit := os.environ.get("FAULT_FILE_BYTES"):
        signal.signal(
            signal.SIGXFSZ, signal.SIG_IGN
        )  # the write fails as on a full disk, instead of killing the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    if step := os.environ.get("FAULT_STEP"):
        _die_at(step, int(os.environ.get("FAULT_TIMES", "1")))
    options = _options()
    if options.program == "worker":
        work()
    elif options.program == "relay":
        relay_outboxes(options.outbox)
    elif options.program == "one-event":
        record_one(options)
    elif options.program == "api":
        serve_api(options)
    elif options.program == "report":
        report(options)
    else:
        produce(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    programs = parser.add_subparsers(dest="program", required=True)
    programs.add_parser("worker")
    relay_parser = programs.add_parser("relay")
    relay_parser.add_argument("--outbox", type=Path, action="append", required=True)
    api_parser = programs.add_parser("api")
    api_parser.add_argument("--outbox", type=Path, required=True)
    api_parser.add_argument("--port", type=int, required=True)
    api_parser.add_argument("--max-bytes", type=int, default=outbox.MAX_BYTES)
    for name in ("producer", "one-event", "report"):
        one = programs.add_parser(name)
        one.add_argument("--outbox", type=Path, required=True)
        one.add_argument("--accepted", type=Path, required=True, help="file for the accepted events")
        one.add_argument("--name", default="trading-controller", help="name of the source")
        one.add_argument("--seed", type=int, required=True)
        one.add_argument("--variant", type=int, default=0, help="variant of the content, for a copy with the same seed")
        one.add_argument("--first", type=int, default=0, help="number of the first event")
        one.add_argument("--count", type=int, default=10**6, help="number of events")
        one.add_argument("--pause", type=float, default=0.0, help="most seconds between two events")
        one.add_argument("--settle-every", type=int, default=0, help="wait after so that many events are settled")
        one.add_argument("--portfolio", type=int, default=1, help="report: number of the portfolio")
        one.add_argument("--late", type=float, default=0.0, help="report: age of the events in seconds")
        one.add_argument("--end", choices=("return", "kill"), default="return", help="report: how the program ends")
        one.add_argument("--move-after", type=int, default=0, help="rename the outbox after this number of events")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Programs that the fault tests run as processes: `python -m tests.faults.programs producer|worker ...`.

With FAULT_STEP set, a program kills itself with SIGKILL when it reaches that step for the FAULT_TIMES-th time; with
FAULT_FILE_BYTES, none of its files can grow beyond that.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from producers import relay
from producers.events import PortfolioSnapshot, SignalArchive
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from producers.relay import Relay
from tests.factories import a_signal, a_snapshot, an_archive

# What a producer of the random run sends: mostly new facts, some that others send too, some in conflict.
_SHARED_FACTS = 40
_MOST_UNDER_WAY = 1000


def produce(outbox: str, seed: int, count: int, pause_seconds: float, in_flight: int = 0) -> None:
    """Record `count` events, one at a time, and say of each on stdout that it was accepted.

    With `in_flight`, it waits after every so many events until they are settled: it meets each step that often.
    """
    dice = random.Random(seed)
    with HistoryProducer(outbox=outbox, name=f"producer-{seed % 1000}") as producer:
        for number in range(count):
            receipt = producer.record(_payload(dice, seed, number))
            # In one write: a death of the process leaves a whole line or none.
            sys.stdout.write(f"{receipt.source} {receipt.sequence} {receipt.event_id}\n")
            sys.stdout.flush()
            time.sleep(pause_seconds * dice.random())
            while number % 50 == 0 and producer.status().depth > _MOST_UNDER_WAY:
                time.sleep(0.1)  # a backlog of hours would have to be drained before anything can be judged
            if in_flight and (number + 1) % in_flight == 0:
                _wait_until_settled(producer)
        producer.flush(30)


def _wait_until_settled(producer: HistoryProducer) -> None:
    deadline = time.monotonic() + 30
    while producer.status().depth:
        if time.monotonic() > deadline:
            raise TimeoutError("what was recorded was not settled in 30 s")
        time.sleep(0.01)


def _payload(dice: random.Random, seed: int, number: int) -> PortfolioSnapshot | SignalArchive:
    if dice.random() < 0.1:
        shared = timedelta(days=1, seconds=dice.randrange(_SHARED_FACTS))
        return a_snapshot(after=shared, portfolio_id=0, balance=dice.choice([1, 1, 1, 2]))
    after = timedelta(seconds=number)
    if dice.random() < 0.2:
        return an_archive(after=after, portfolio_id=seed, signals=[a_signal(), a_signal(reason=str(number))])
    return a_snapshot(after=after, portfolio_id=seed)


def work() -> None:
    """A HistoryWorker as the command starts it; FAULT_BATCH makes its batches small."""
    from consumers.cli import app
    from consumers.queue import lane

    lane.BATCH_JOBS = int(os.environ.get("FAULT_BATCH", lane.BATCH_JOBS))

    app(["worker"])


def _die_at(step: str, times: int) -> None:
    """Wrap the functions around the step so that the process dies there."""
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
    "before send": lambda: (Relay, "_send", "before"),
    "after send": lambda: (Relay, "_send", "after"),
    "after mark": lambda: (Outbox, "mark_sent", "after"),
    "before settle": lambda: (Outbox, "settle", "before"),
    "after settle": lambda: (Outbox, "settle", "after"),
}
WORKER_STEPS = {
    "before reserve": _in_worker("consumers.queue.reservations", "Reservations.reserve", "before"),
    "after reserve": _in_worker("consumers.queue.reservations", "Reservations.reserve", "after"),
    "before insert": _in_worker("consumers.settling", "insert_events", "before"),
    "after insert": _in_worker("consumers.settling", "insert_events", "after"),
    "after commit": _in_worker("consumers.settling", "_settle_together", "after"),
    "before finish": _in_worker("consumers.queue.finishing", "Finishing.finish", "before"),
    "after acknowledge": _in_worker("consumers.queue.finishing", "acknowledge", "after"),
    "after finish": _in_worker("consumers.queue.finishing", "Finishing.finish", "after"),
    "while handing back": _in_worker("consumers.queue.reservations", "Reservations.hand_back", "before"),
}
_STEPS: dict[str, Callable[[], tuple[Any, str, str]]] = {**PRODUCER_STEPS, **WORKER_STEPS}


def look_often() -> None:
    """Shorten the intervals at which a relay looks after what is overdue, so that a run can be judged in time."""
    relay._LAST_CHECK_SECONDS = 15.0


def main() -> None:
    look_often()
    if limit := os.environ.get("FAULT_FILE_BYTES"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write, as on a full disk, instead of an end
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    if step := os.environ.get("FAULT_STEP"):
        _die_at(step, int(os.environ.get("FAULT_TIMES", "1")))
    if sys.argv[1] == "worker":
        work()
    else:
        outbox, seed, count, pause, *in_flight = sys.argv[2:]
        produce(str(Path(outbox)), int(seed), int(count), float(pause), *map(int, in_flight))


if __name__ == "__main__":
    main()

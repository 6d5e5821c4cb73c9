"""Figures of one run of the benchmark `quality`: lost, doubled, recovery, latency, queue entries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.checks import require
from tests.benchmarks.printing import quantiles
from tests.factories import INSTANT

DELAYED_SECONDS = 1.0
LEAD_SECONDS = 4.0  # before the first fault; the workers warm up then, so the latency of these events does not count
_PUSHES = {b"RPUSH", b"LPUSH", b"RPUSHX", b"LPUSHX"}
_MOVES = {b"LMOVE", b"RPOPLPUSH", b"BLMOVE", b"BRPOPLPUSH"}


class Fault(NamedTuple):
    """A fault; its times are seconds from the first event's."""

    began: float
    ended: float


class Stored(NamedTuple):
    """Row of the event that happened at `at`; the producer's events are one second apart.

    `committed` is in seconds from the first event's time; `attempts` is the number of committed inserts.
    """

    at: datetime
    committed: float
    attempts: int

    @property
    def number(self) -> int:
        return round((self.at - INSTANT).total_seconds())


@dataclass(frozen=True)
class RunFigures:
    """Figures of one run.

    `calls`: calls of the producer; `accepted`: those that returned. `lost`: accepted events without a row at the end.
    `doubled`: committed inserts of an event that another one had inserted before. `recoveries`: seconds, one for each
    fault, None if an event that it delayed is lost. `p99`: seconds. `entries`: queue entries per delivery, None without
    Redis. `waited`: seconds from the end of the load until the queue was empty.
    """

    calls: int
    accepted: int
    lost: int
    doubled: int
    recoveries: list[float | None]
    p99: float
    entries: float | None
    waited: float


def count_figures(
    calls: int,
    accepted: Sequence[int],
    rows: Sequence[Stored],
    *,
    faults: Sequence[Fault],
    rate: float,
    entries: float | None,
    waited: float,
) -> RunFigures:
    """Compare the numbers of the accepted events with the rows; event n was due after n / rate seconds."""
    stored = {row.number: row for row in rows}
    require(len(stored) == len(rows), "an event is more than one row")
    delays = {number: stored[number].committed - number / rate for number in set(accepted) if number in stored}
    lost = set(accepted) - stored.keys()
    return RunFigures(
        calls=calls,
        accepted=len(accepted),
        lost=len(lost),
        doubled=sum(one.attempts - 1 for one in stored.values()),
        recoveries=_recoveries(faults, {number / rate: delay for number, delay in delays.items()}, lost, rate),
        p99=quantiles([delay for number, delay in delays.items() if number / rate >= LEAD_SECONDS])[1],
        entries=entries,
        waited=waited,
    )


def _recoveries(
    faults: Sequence[Fault], delays_by_due: dict[float, float], lost: set[int], rate: float
) -> list[float | None]:
    """Return for each fault the time from its end until the last event that it delayed was a row.

    A late event is a row more than DELAYED_SECONDS after it was due. It belongs to the last fault that began before it
    was due plus DELAYED_SECONDS; earlier ones belong to the first fault. The fault delayed it if it was no row before.
    """
    recoveries: list[float | None] = []
    if not faults:
        return recoveries
    bounds = [-math.inf, *(fault.began - DELAYED_SECONDS for fault in faults[1:]), math.inf]
    for fault, begin, end in zip(faults, bounds[:-1], bounds[1:], strict=True):
        late = [due + delay for due, delay in delays_by_due.items() if begin <= due < end and delay > DELAYED_SECONDS]
        delayed = [committed for committed in late if committed > fault.began]
        is_lost = any(begin <= number / rate < end for number in lost)
        recoveries.append(None if is_lost else max([0.0, *(committed - fault.ended for committed in delayed)]))
    return recoveries


def queue_pushes(folder: Path, key: str) -> int:
    """Return how many ids were put into the queue's list `key`, according to the append-only file in `folder`.

    Redis writes there each command that changes data, those of scripts and transactions between MULTI and EXEC. It
    rewrites the file at 64 MB only.
    """
    files = sorted(folder.glob("*.incr.aof"))
    require(len(files) == 1, f"Redis has rewritten its append-only file: {files}")
    count, together, depth = 0, list[list[bytes]](), 0
    for command in _commands(files[0].read_bytes()):
        depth += {b"MULTI": 1, b"EXEC": -1}.get(command[0].upper(), 0)
        together.append(command)
        if not depth:
            count += _pushed(together, key.encode())
            together = []
    return count


def _pushed(commands: Sequence[Sequence[bytes]], key: bytes) -> int:
    """Return how many ids these commands, which run as one step, put into the list and leave there.

    To reserve the job that an idle thread has waited for, the script puts it back and takes it again, with others: that
    is no entry in the queue.
    """
    pushed = moved = taken = 0
    is_reserving = any(command[0].upper() == b"LTRIM" and command[1] == key for command in commands)
    for command in commands:
        name = command[0].upper()
        if name in _PUSHES:
            pushed += len(command) - 2 if command[1] == key else 0
            taken += len(command) - 2 if command[1] != key and is_reserving else 0
        elif name in _MOVES:
            moved += command[2] == key
    return pushed + max(0, moved - taken)


def _commands(content: bytes) -> Iterator[list[bytes]]:
    """Yield the commands of an append-only file: `*<count>`, then for each argument `$<length>` and its bytes."""
    at = 0
    while at < len(content):
        count, at = _number(content, at, b"*")
        command = []
        for _ in range(count):
            length, at = _number(content, at, b"$")
            command.append(content[at : at + length])
            at += length + 2
        if at <= len(content):
            yield command


def _number(content: bytes, at: int, mark: bytes) -> tuple[int, int]:
    end = content.find(b"\r\n", at)
    if end < 0:  # Redis was killed while it wrote this
        return 0, len(content) + 1
    require(content[at : at + 1] == mark, f"the append-only file has {content[at:end]!r} in place of {mark!r}")
    return int(content[at + 1 : end]), end + 2

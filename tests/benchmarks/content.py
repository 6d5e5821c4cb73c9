"""The audit of content: the time of an audit of a large history, and what the digests cost a producer."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from sqlalchemy import text

from consumers.db.engine import engine, get_db, long_read
from consumers.db.stored_content import contents_by_number
from consumers.ops.content_audit import audit_content
from producers.acknowledgements import Acknowledgement, Outcome
from producers.outbox import Outbox
from producers.segments import SEGMENT_EVENTS, Segment, SettledEvent, continued
from tests.benchmarks.checks import require
from tests.benchmarks.environment import bench_stack
from tests.benchmarks.filling import fill_snapshots
from tests.benchmarks.report import Report
from tests.factories import a_snapshot, an_archive

_SOURCES = 4  # of fill_snapshots
_BLOCK = 500  # events of one call
_KEPT_BLOCKS = 20  # before they are deleted


def measure_content(rows: int, report: Report) -> None:
    """Print the seconds of an audit of unchanged rows, and of one that must find one changed row."""
    with bench_stack():
        fill_snapshots(0, rows - 1)
        chains = _chains(rows)
        changed = random.Random(rows).randrange(rows)
        for label, differing in (("unchanged", 0), ("one row changed", 1)):
            if differing:
                with get_db() as db:
                    changing = text("UPDATE portfolio_history SET balance = balance + 1 WHERE balance = :number")
                    require(db.execute(changing, {"number": changed}).rowcount == 1, "no row was changed")
            started = time.monotonic()
            found = audit_content(chains, {})
            seconds = time.monotonic() - started
            differences = [(name, one.differences) for name, one in found.items() if one.differing]
            require(sum(one.differing for one in found.values()) == differing, f"the audit found {differences}")
            require(sum(one.checked for one in found.values()) == rows, "not all rows were checked")
            report.add("content", f"{rows} rows, {label}", "s", [seconds])
            print(f"\naudit of the content of {rows:,} rows, {label}: {seconds:.1f} s {differences}", flush=True)
        engine().dispose()


def _chains(rows: int) -> dict[str, list[Segment]]:
    """Return the chains that the outboxes of these rows would have."""
    chains: dict[str, list[Segment]] = {}
    with long_read() as db:
        for n in range(_SOURCES):
            source = f"bot-{n}/0123456789abcdef0123456789abcdef"
            segments = chains[source] = []
            for first in range(1, rows // _SOURCES + 1, SEGMENT_EVENTS):
                contents = contents_by_number(db, source, range(first, first + SEGMENT_EVENTS))
                events = sorted(SettledEvent(one.sequence or 0, False, one.digest or b"") for one in contents)
                segments += continued(segments[-1].empty_successor() if segments else None, events)
    return chains


def measure_chain(events: int, report: Report) -> None:
    """Record, settle and delete events in one process, in blocks that alternately keep digests of the deleted entries.

    Print the time of a call, and the CPU time of an event, for the producer and its relay together.
    """
    with TemporaryDirectory() as folder:
        outboxes = {True: Outbox(Path(folder, "with.db")), False: Outbox(Path(folder, "without.db"))}
        calls: dict[bool, list[float]] = {True: [], False: []}
        cpu: dict[bool, list[float]] = {True: [], False: []}
        for block in range(events // (2 * _BLOCK * _KEPT_BLOCKS)):
            for with_digests in (True, False) if block % 2 else (False, True):
                with nullcontext() if with_digests else _no_digests():
                    started = time.process_time()
                    for n in range(_KEPT_BLOCKS):
                        calls[with_digests].append(
                            _record_block(outboxes[with_digests], (block * _KEPT_BLOCKS + n) * _BLOCK)
                        )
                    while outboxes[with_digests].deliveries.prune(keep_seconds=-1):
                        pass
                    cpu[with_digests].append((time.process_time() - started) / (_KEPT_BLOCKS * _BLOCK) * 1e6)
        for with_digests, label in ((True, "with digests"), (False, "without digests")):
            report.add_quantiles("chain", f"one call with {_BLOCK} events, {label}", calls[with_digests])
            value = report.add("chain", f"an event, {label}", "µs of CPU", cpu[with_digests])
            print(f"CPU of an event, {label}: {value:.1f} µs (median of {len(cpu[with_digests])} blocks)", flush=True)
        used = {with_digests: outbox.used_bytes() for with_digests, outbox in outboxes.items()}
        bytes_an_event = (used[True] - used[False]) / (events / 2)
        report.add("chain", "digests of a deleted event", "bytes", [bytes_an_event])
        print(f"digests: {bytes_an_event:.2f} bytes an event", flush=True)


def _record_block(outbox: Outbox, first: int) -> float:
    """Record a block of events in one call, settle it, and return the seconds of the call."""
    moments = [timedelta(seconds=n) for n in range(first, first + _BLOCK, 2)]
    payloads = [make(after=moment) for moment in moments for make in (a_snapshot, an_archive)]
    started = time.perf_counter()
    accepted = outbox.append("trading-controller", payloads)
    seconds = time.perf_counter() - started
    outbox.deliveries.mark_sent({entry.position: 300.0 for entry in outbox.deliveries.pending(_BLOCK)})
    stored = {
        one.sequence: Acknowledgement(
            one.source_id, one.sequence, one.nonce, str(one.event_id), Outcome("stored", row_id=1), at=0
        )
        for one in accepted
    }
    outbox.deliveries.settle(accepted[0].source_id, 0, stored)
    return seconds


@contextmanager
def _no_digests() -> Iterator[None]:
    """Delete entries as if no digest of them were kept."""
    with (
        mock.patch("producers.outbox_deliveries.digest_of_text", return_value=b""),
        mock.patch("producers.outbox_deliveries.add_to_chain"),
    ):
        yield

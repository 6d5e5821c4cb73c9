"""The benchmark `quality`: how its figures are counted, and the table of its document."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.benchmarks.quality import quality_table
from tests.benchmarks.quality_counts import Fault, RunFigures, Stored, count_figures, queue_pushes
from tests.benchmarks.quality_faults import KINDS
from tests.benchmarks.quality_producer import accepted_numbers
from tests.benchmarks.quality_run import WORKER_KINDS
from tests.benchmarks.report import Report
from tests.documents import ROOT, block, text_of
from tests.factories import INSTANT

_KEY = "rq:queue:history"
_RATE = 1.0
"""Event n is due after n seconds."""


def a_row(number: int, *, delay: float = 0.1, attempts: int = 1) -> Stored:
    return Stored(INSTANT + timedelta(seconds=number), number / _RATE + delay, attempts)


def judged(rows: list[Stored], *, accepted: list[int] | None = None, faults: tuple[Fault, ...] = ()) -> RunFigures:
    """Judge 20 calls, which were all accepted by default."""
    numbers = list(range(20)) if accepted is None else accepted
    return count_figures(20, numbers, rows, faults=faults, rate=_RATE, entries=1.0, waited=0.0)


def test_without_a_fault_nothing_is_lost_doubled_or_late() -> None:
    found = judged([a_row(number) for number in range(20)])
    assert (found.accepted, found.lost, found.doubled, found.recoveries) == (20, 0, 0, [])
    assert found.p99 == pytest.approx(0.1)


def test_an_accepted_event_without_a_row_is_lost_and_its_fault_has_no_recovery() -> None:
    found = judged([a_row(number) for number in range(20) if number != 7], faults=(Fault(5, 6), Fault(12, 13)))
    assert found.lost == 1
    assert found.recoveries == [None, 0.0]


def test_an_event_whose_call_failed_is_neither_lost_nor_late() -> None:
    accepted = [number for number in range(20) if number not in (7, 8)]
    rows = [a_row(number, delay=9 if number == 8 else 0.1) for number in range(20) if number != 7]
    found = judged(rows, accepted=accepted, faults=(Fault(5, 6),))
    assert (found.accepted, found.lost, found.recoveries) == (18, 0, [0.0])
    assert found.p99 == pytest.approx(0.1)


def test_each_committed_insert_after_the_first_is_doubled() -> None:
    attempts = {3: 2, 4: 3}
    assert judged([a_row(number, attempts=attempts.get(number, 1)) for number in range(20)]).doubled == 3


def test_the_benchmark_fails_if_an_event_is_two_rows() -> None:
    with pytest.raises(SystemExit, match="an event is more than one row"):
        judged([a_row(1), a_row(1)])


def test_recovery_lasts_until_the_last_event_that_the_fault_delayed_is_a_row() -> None:
    delays = {5: 4.0, 7: 3.5, 13: 8.0}
    rows = [a_row(number, delay=delays.get(number, 0.9)) for number in range(20)]
    assert judged(rows, faults=(Fault(5.2, 6), Fault(12, 12))).recoveries == [pytest.approx(4.5), pytest.approx(9.0)]


def test_an_event_that_was_late_before_the_first_fault_is_delayed_by_it_if_it_was_no_row_yet() -> None:
    rows = [a_row(number, delay={0: 30.0, 1: 1.5}.get(number, 0.1)) for number in range(20)]
    assert judged(rows, faults=(Fault(6, 7), Fault(12, 13))).recoveries == [pytest.approx(23.0), 0.0]


def test_the_latency_of_the_events_before_the_first_fault_does_not_count() -> None:
    rows = [a_row(number, delay=9 if number < 4 else 0.1) for number in range(20)]
    assert judged(rows).p99 == pytest.approx(0.1)


def an_append_only_file(folder: Path, *commands: str, end: bytes = b"") -> Path:
    text = b""
    for command in commands:
        words = command.encode().split()
        text += b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
    (folder / "appendonly.aof.1.incr.aof").write_bytes(text + end)
    return folder


def test_each_id_that_is_put_into_the_queue_is_an_entry(tmp_path: Path) -> None:
    sent = ("SELECT 0", "MULTI", f"DEL {_KEY}x", f"RPUSH {_KEY} a b c", "EXEC")
    requeued = ("MULTI", f"LMOVE reserved {_KEY} right left", f"LMOVE reserved {_KEY} right left", "EXEC")
    others = (f"LMOVE {_KEY} reserved left right", "RPUSH other d", f"LPUSH {_KEY} a")
    assert queue_pushes(an_append_only_file(tmp_path, *sent, *requeued, *others), _KEY) == 3 + 2 + 1


def test_a_job_that_the_script_puts_back_and_reserves_again_is_no_entry(tmp_path: Path) -> None:
    put_back = [f"LMOVE reserved {_KEY} right left"] * 3
    reserve = ("MULTI", "SET lease 1", *put_back, "RPUSH reserved a", f"LTRIM {_KEY} 1 -1", "EXEC")
    assert queue_pushes(an_append_only_file(tmp_path, f"RPUSH {_KEY} a b c", *reserve), _KEY) == 3 + 2


def test_the_command_that_redis_was_writing_when_it_was_killed_is_no_entry(tmp_path: Path) -> None:
    folder = an_append_only_file(tmp_path, f"RPUSH {_KEY} a", end=b"*3\r\n$5\r\nRPUSH\r\n$16\r\nrq:que")
    assert queue_pushes(folder, _KEY) == 1


def test_a_number_that_was_being_written_when_the_producer_was_killed_is_not_accepted(tmp_path: Path) -> None:
    (tmp_path / "accepted").write_text("0\n1\n1")
    assert accepted_numbers(tmp_path) == [0, 1]


def test_the_document_says_how_to_measure_again_and_to_print_the_table() -> None:
    _, measure, show = block("tests/benchmarks/QUALITY.md", "run").splitlines()
    figures = "tests/benchmarks/quality.json"
    assert measure == f"python -m tests.benchmarks quality --json {figures}"
    assert show == f"python -m tests.benchmarks --table {figures}"


def test_the_table_of_the_document_is_the_one_of_its_figures() -> None:
    table = quality_table(Report.read(ROOT / "tests/benchmarks/quality.json"))
    assert f"<!-- quality -->\n{table}" in text_of("tests/benchmarks/QUALITY.md")


def test_the_table_has_each_kind_of_fault_for_each_worker() -> None:
    """PgQueuer has no Redis."""
    lines = quality_table(Report.read(ROOT / "tests/benchmarks/quality.json")).splitlines()[2:]
    expected = [(kind, one) for kind in KINDS for one in WORKER_KINDS if one != "PgQueuer" or not KINDS[kind].of_redis]
    assert [tuple(line.split(" | ")[:2]) for line in lines] == [(f"| {kind}", one) for kind, one in expected]


def test_a_fault_without_recovery_is_never_recovered_in_the_table() -> None:
    values: dict[str, list[float]] = {
        "calls": [5],
        "accepted": [5],
        "lost": [1],
        "doubled": [0],
        "recovery": [2.5, 3.5],
        "latency p99": [1200],
    }
    values |= {"never recovered": [1]}
    report = Report()
    for name, runs in values.items():
        report.add("quality", f"none, PgQueuer: {name}", "", runs)
    assert quality_table(report).splitlines()[-1] == "| none | PgQueuer | 5 of 5 | 1 | 0 | 3.5 | never | 1,200 | – |"

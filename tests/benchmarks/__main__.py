"""Measure the pipeline on temporary servers.

Example: `python -m tests.benchmarks throughput latency --json report.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.adoption import measure_adoption
from tests.benchmarks.asking import measure_api
from tests.benchmarks.auditing import measure_audit
from tests.benchmarks.content import measure_chain, measure_content
from tests.benchmarks.environment import machine_facts
from tests.benchmarks.event_loop import measure_event_loop
from tests.benchmarks.growth import measure_growth
from tests.benchmarks.latency import measure_latency
from tests.benchmarks.memory import measure_memory
from tests.benchmarks.migration import measure_import
from tests.benchmarks.outages import measure_outages
from tests.benchmarks.quality import measure_quality, quality_table
from tests.benchmarks.recording import measure_record
from tests.benchmarks.recovery import measure_recovery
from tests.benchmarks.report import Report, figure_tables
from tests.benchmarks.space import measure_space
from tests.benchmarks.steps import measure_steps
from tests.benchmarks.throughput import measure_throughput

# Benchmark -> its function and the default of --count.
MEASURES: dict[str, tuple[Callable[[int, Report], None], int]] = {
    "throughput": (measure_throughput, 50_000),
    "record": (measure_record, 40_000),
    "latency": (measure_latency, 300),
    "steps": (measure_steps, 300),
    "asyncio": (measure_event_loop, 1000),
    "memory": (measure_memory, 1_000_000),
    "growth": (measure_growth, 10_000_000),
    "outages": (measure_outages, 200),
    "recovery": (measure_recovery, 20),
    "quality": (measure_quality, 3),
    "audit": (measure_audit, 10_000_000),
    "content": (measure_content, 10_000_000),
    "chain": (measure_chain, 1_000_000),
    "import": (measure_import, 1_000_000),
    "adopt": (measure_adoption, 1_000_000),
    "api": (measure_api, 10_000_000),
    "space": (measure_space, 200_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ", ".join(MEASURES)
    parser.add_argument("names", metavar="name", nargs="*", help=f"{names}; all of them by default")
    parser.add_argument("--count", type=int, help="events, calls, repetitions or rows, depending on the benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and each of its runs to FILE")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing, print the figures in FILE as tables"
    )
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in MEASURES]:
        parser.error(f"unknown: {', '.join(unknown)}; the benchmarks are {names}")
    if options.table:
        try:
            read = Report.read(options.table)
        except (OSError, ValueError, LookupError, TypeError) as error:
            parser.error(f"--table {options.table}: cannot be read: {error}")
        is_quality = any(figure.benchmark == "quality" for figure in read.figures)
        print(quality_table(read) if is_quality else figure_tables(read), end="")
        return
    report = Report(machine_facts())
    print("; ".join(f"{name} {fact}" for name, fact in report.machine.items()), flush=True)
    for name in options.names or MEASURES:
        measure, count = MEASURES[name]
        measure(options.count or count, report)
        if options.json:
            report.write(options.json)


if __name__ == "__main__":
    main()

"""Duration of the audit of a large history."""

from __future__ import annotations

import time

from consumers.ops.audit import audit
from tests.benchmarks.checks import require
from tests.benchmarks.environment import bench_stack
from tests.benchmarks.filling import fill_snapshots
from tests.benchmarks.report import Report


def measure_audit(rows: int, report: Report) -> None:
    """Print the seconds; fail unless the audit finds the one missing sequence number."""
    with bench_stack():
        started = time.monotonic()
        fill_snapshots(0, rows - 1, lost=rows // 2)
        filled = time.monotonic() - started
        started = time.monotonic()
        audits = audit()
        seconds = time.monotonic() - started
        missing = [(one.source.split("/")[0], one.missing) for one in audits if one.missing]
    require(len(missing) == 1, f"the audit found {missing} instead of one missing number")
    report.add("audit", f"{rows} rows", "s", [seconds])
    report.add("audit", f"fill of {rows} rows", "s", [filled])
    print(f"\naudit of {rows:,} rows in {len(audits)} sources: {seconds:.1f} s, missing: {missing}", end=" ")
    print(f"(filled in {filled:.0f} s)", flush=True)

"""Measure the pipeline, on servers of its own: `python -m tests.benchmarks [latency|outages|recovery|audit]`."""

from __future__ import annotations

import argparse

from tests.benchmarks.auditing import measure_audit
from tests.benchmarks.latency import measure_latency
from tests.benchmarks.outages import measure_outages
from tests.benchmarks.recovery import measure_recovery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    what = {
        "latency": (measure_latency, 300),
        "outages": (measure_outages, 200),
        "recovery": (measure_recovery, 20),
        "audit": (measure_audit, 10_000_000),
    }
    parser.add_argument("what", choices=what, nargs="?", default="latency")
    parser.add_argument("--count", type=int, help="events, calls, times or rows")
    options = parser.parse_args()
    measure, count = what[options.what]
    measure(options.count or count)


if __name__ == "__main__":
    main()

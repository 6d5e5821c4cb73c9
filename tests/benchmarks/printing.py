"""Rows of figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_LABEL = 34


def print_header(label: str) -> None:
    print(f"{label:{_LABEL}}{'p50':>8}{'p99':>8}{'max':>8}", flush=True)


def print_quantiles(label: str, seconds: Sequence[float]) -> None:
    """In milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    print(f"{label:{_LABEL}}{cuts[49] * 1e3:8.2f}{cuts[98] * 1e3:8.2f}{max(seconds) * 1e3:8.2f}", flush=True)

"""Tables of figures on standard output."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_LABEL = 38


def print_header(label: str) -> None:
    print(f"\n{label:{_LABEL}}{'p50':>9}{'p99':>9}{'max':>9}", flush=True)


def print_quantiles(label: str, seconds: Sequence[float], note: str = "") -> None:
    """Print p50, p99 and maximum in milliseconds."""
    p50, p99, most = quantiles(seconds)
    print(f"{label:{_LABEL}}{p50 * 1e3:9.2f}{p99 * 1e3:9.2f}{most * 1e3:9.2f}  {note}".rstrip(), flush=True)


def quantiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return p50, p99 and maximum; with fewer than 100 samples, p99 is the maximum."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
    return statistics.median(seconds), cuts[98] if len(seconds) >= 100 else max(seconds), max(seconds)


def print_columns(title: str, columns: Sequence[str]) -> None:
    print(f"\n{title:{_LABEL}}" + "".join(f"{column:>{width(column)}}" for column in columns), flush=True)


def print_row(label: str, columns: Sequence[str], cells: Sequence[str]) -> None:
    row = "".join(f"{cell:>{width(column)}}" for cell, column in zip(cells, columns, strict=True))
    print(f"{label:{_LABEL}}{row}", flush=True)


def width(column: str) -> int:
    return max(10, len(column) + 2)


def spread(runs: Sequence[float], digits: int = 0) -> str:
    """Return `min..max`."""
    return f"{min(runs):,.{digits}f}..{max(runs):,.{digits}f}"

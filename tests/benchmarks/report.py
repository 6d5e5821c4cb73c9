"""Report of a benchmark run: figures with their units and each single run, as a JSON file and as tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from tests.benchmarks.printing import print_quantiles, quantiles


@dataclass(frozen=True)
class Figure:
    """One figure: `value`, the median of `runs`, in `unit`.

    If it is the median of many durations, `quantiles` has p50, p99 and maximum instead of `runs`.
    """

    benchmark: str
    label: str
    unit: str
    value: float
    runs: Sequence[float] = ()
    quantiles: Sequence[float] = ()


@dataclass
class Report:
    """All figures of one run of the program."""

    machine: Mapping[str, str] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, benchmark: str, label: str, unit: str, runs: Sequence[float]) -> float:
        """Add one figure and return the median of its runs."""
        value = statistics.median(runs)
        self.figures.append(Figure(benchmark, label, unit, value, list(runs)))
        return value

    def add_quantiles(self, benchmark: str, label: str, seconds: Sequence[float], note: str = "") -> None:
        """Add and print p50, p99 and maximum in milliseconds. `note` is a remark about this figure."""
        milliseconds = [one * 1e3 for one in quantiles(seconds)]
        self.figures.append(Figure(benchmark, label, "ms", milliseconds[0], quantiles=milliseconds))
        print_quantiles(label, seconds, note)
        if note:
            self.notes.append(f"{benchmark}, {label}: {note}")

    def note(self, text: str) -> None:
        """Print and keep a remark about the figures."""
        self.notes.append(text)
        print(text, flush=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        document = json.loads(path.read_text("utf-8"))
        return cls(document["machine"], [Figure(**one) for one in document["figures"]], document["notes"])

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", "utf-8")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" if row else f"{'|---' * len(head)}|\n" for row in (head, (), *rows))


def figure_tables(report: Report) -> str:
    """Return for each benchmark of a report a heading, its tables in Markdown, and its notes."""
    parts = []
    for benchmark in dict.fromkeys(figure.benchmark for figure in report.figures):
        figures = [figure for figure in report.figures if figure.benchmark == benchmark]
        rates = [_rate_cells(figure) for figure in figures if not figure.quantiles]
        latencies = [(figure.label, *map(_shown, figure.quantiles)) for figure in figures if figure.quantiles]
        parts.append(f"## {benchmark}\n")
        if rates:
            parts.append(markdown(("figure", "unit", "median", "minimum–maximum"), rates))
        if latencies:
            parts.append(markdown(("milliseconds", "p50", "p99", "max"), latencies))
        notes = [note for note in report.notes if note.startswith(f"{benchmark}, ")]
        if notes:
            parts.append("".join(f"- {note}\n" for note in notes))
    return "\n".join(parts)


def _rate_cells(figure: Figure) -> tuple[str, str, str, str]:
    spread = f"{_shown(min(figure.runs))}–{_shown(max(figure.runs))}" if len(figure.runs) > 1 else "one run"
    return figure.label, figure.unit, _shown(figure.value), spread


def _shown(value: float) -> str:
    """Return a number with about four significant digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"

"""Report of a benchmark run: figures with their units and each single run, as a JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One figure: `value`, the median of `runs` unless `label` says otherwise, in `unit`."""

    benchmark: str
    label: str
    unit: str
    value: float
    runs: Sequence[float]


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

    def note(self, text: str) -> None:
        """Print and keep a remark about the figures."""
        self.notes.append(text)
        print(text, flush=True)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", "utf-8")

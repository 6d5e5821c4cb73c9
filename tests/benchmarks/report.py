"""What was measured: figures with their units and every single run, for the table and for a file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """`value` (the median of `runs` unless said otherwise in `label`) in `unit`, and every single run."""

    benchmark: str
    label: str
    unit: str
    value: float
    runs: Sequence[float]


@dataclass
class Report:
    """All figures of one call of the program."""

    machine: Mapping[str, str] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, benchmark: str, label: str, unit: str, runs: Sequence[float]) -> float:
        """Keep one figure; returns the median of its runs."""
        value = statistics.median(runs)
        self.figures.append(Figure(benchmark, label, unit, value, list(runs)))
        return value

    def note(self, text: str) -> None:
        """Print and keep a sentence that the figures need."""
        self.notes.append(text)
        print(text, flush=True)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", "utf-8")

"""Survivors that no test has to kill, each with its reason, from survivors.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.running import Result

FILE = Path(__file__).parent / "survivors.toml"


_ANY = "any"


@dataclass(frozen=True)
class Explanation:
    """Why a surviving mutant needs no test.

    Attributes:
        line: The unchanged line's text, without its indentation.
        change: The change, or `any` for all changes of the line.
    """

    path: str
    line: str
    change: str
    reason: str

    def matches(self, result: Result) -> bool:
        """Return whether it explains the mutant of this result."""
        mutant = result.mutant
        return (self.path, self.line) == (mutant.path, result.line_text) and self.change in {_ANY, mutant.change}


def read_explanations(file: Path = FILE) -> list[Explanation]:
    """Return all explanations of the file."""
    return [Explanation(**entry) for entry in tomllib.loads(file.read_text("utf-8"))["survivor"]]


def key_of(result: Result) -> tuple[str, str, str]:
    """Return the key that an explanation of this result has."""
    return result.mutant.path, result.line_text, result.mutant.change


def obsolete(
    explanations: Sequence[Explanation], results: Sequence[Result], left_out: Collection[tuple[str, str]]
) -> list[Explanation]:
    """Return the explanations in the files of `results` that match no surviving mutant.

    `left_out` has the path and change of each mutant that a sample does not contain: they may match.
    """
    survivors = [result for result in results if result.verdict in {"survived", "not reached"}]
    paths = {result.mutant.path for result in results}
    return [
        one
        for one in explanations
        if one.path in paths
        and not any(one.matches(result) for result in survivors)
        and not any(one.path == path and one.change in {_ANY, change} for path, change in left_out)
    ]

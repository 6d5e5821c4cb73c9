"""Survivors that no test has to kill, each with its reason, from the files in `survivors`.

Each file is named after a target, and has tables like this one:

    [["producers/relay.py"]]
    line = "_BUSY_ENTRIES = 3"
    change = "any"
    reason = "tuning: no promise depends on it"

`line` is the unchanged line without its indentation; "return (2)" is the second line `return` of the file. `change` is
the change, or "any" for all changes of the line. Both may be lists.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.running import Result

FOLDER = Path(__file__).parent / "survivors"
Key = tuple[str, str, str]
"""Path, text of the unchanged line as `line_text` returns it, and change of a mutant."""

_ANY = "any"


@dataclass(frozen=True)
class Explanation:
    """Why a surviving mutant needs no test.

    Attributes:
        line: The unchanged line, as `line_text` returns it.
        change: The change, or `any` for all changes of the line.
    """

    path: str
    line: str
    change: str
    reason: str

    def matches(self, key: Key) -> bool:
        """Return whether it explains the mutant with this key."""
        path, line, change = key
        return (self.path, self.line) == (path, line) and self.change in {_ANY, change}


def read_explanations(folder: Path = FOLDER) -> list[Explanation]:
    """Return the explanations of all files: one for each line and change of a table."""
    return [
        Explanation(path, line, change, entry["reason"])
        for file in sorted(folder.glob("*.toml"))
        for path, entries in tomllib.loads(file.read_text("utf-8")).items()
        for entry in entries
        for line in _as_list(entry["line"])
        for change in _as_list(entry["change"])
    ]


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def obsolete(
    explanations: Sequence[Explanation], results: Sequence[Result], left_out: Collection[Key]
) -> list[Explanation]:
    """Return the explanations that match mutants of `results`, of which none survived.

    `left_out` has the keys of the mutants that a sample does not contain: they may survive.
    """
    keys = {one.key for one in results}
    may_survive = {one.key for one in results if one.verdict in {"survived", "not reached"}} | set(left_out)
    return [one for one in explanations if any(map(one.matches, keys)) and not any(map(one.matches, may_survive))]

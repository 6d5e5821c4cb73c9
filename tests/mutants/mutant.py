"""A mutant: the source with one small change, which a test should notice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A file of the tree with one change.

    Attributes:
        path: Path of the file in the tree, with forward slashes: `producers/events.py`.
        line: Number of the changed line in the unchanged file, from 1.
        change: Short description, such as `<= becomes <`.
        text: The whole changed text of the file.
    """

    path: str
    line: int
    change: str
    text: str


def line_text(text: str, number: int) -> str:
    """Return a line of a file without its indentation. Equal lines of the file are numbered: `return (2)`."""
    lines = [one.strip() for one in text.split("\n")[:number]]
    count = lines.count(lines[-1])
    return lines[-1] if count == 1 else f"{lines[-1]} ({count})"

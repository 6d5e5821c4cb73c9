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

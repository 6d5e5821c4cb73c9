"""Tokens of a source file, and edits of them: the common part of the mutants of Lua and SQL."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.mutants.mutant import Mutant


class Token(NamedTuple):
    """A token: `kind` is the name of its group in the pattern, `start` and `end` are offsets in the file."""

    kind: str
    text: str
    start: int
    end: int


class Edit(NamedTuple):
    """Text that replaces the characters from `start` to before `end`."""

    start: int
    end: int
    text: str
    change: str


def tokens(pattern: re.Pattern[str], text: str, start: int = 0, end: int | None = None) -> list[Token]:
    """Return the tokens between two offsets, without comments. Each group of `pattern` is a kind of token."""
    found = pattern.finditer(text, start, len(text) if end is None else end)
    return [Token(one.lastgroup or "", one[0], *one.span()) for one in found if one.lastgroup != "comment"]


def depths(found: list[Token]) -> list[int]:
    """Return for each token the number of brackets around it; a bracket counts as outside of itself."""
    depth, result = 0, []
    for token in found:
        depth -= token.text in (")", "]", "}")
        result.append(depth)
        depth += token.text in ("(", "[", "{")
    return result


def replaced(token: Token, text: str) -> Edit:
    """Return the edit that replaces one token."""
    return Edit(token.start, token.end, text, f"{token.text} becomes {text}")


def removed(text: str, start: int, end: int) -> Edit:
    """Return the edit that removes a part of the file."""
    part = " ".join(text[start:end].split())
    return Edit(start, end, " ", f"{part if len(part) <= 60 else part[:57] + '...'} is removed")


def mutants(path: str, text: str, edits: Iterable[Edit]) -> Iterator[Mutant]:
    """Yield one mutant per edit, in the order of the file, each text once. Equal changes of a line are numbered."""
    known, counts = {text}, Counter[tuple[int, str]]()
    for one in sorted(edits):
        changed = text[: one.start] + one.text + text[one.end :]
        if changed not in known:
            known.add(changed)
            key = (text.count("\n", 0, one.start) + 1, one.change)
            counts[key] += 1
            number = f" ({counts[key]})" if counts[key] > 1 else ""
            yield Mutant(path, key[0], one.change + number, changed)

"""Checks the project's vocabulary: one term for one thing, and no retired term.

The glossary in consumers/README.md defines the terms. `python -m tests.plain_words [FOLDER …]` prints each finding.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PRODUCT = ("README.md", "docker-compose.yml", "schema.sql", "pyproject.toml", ".ci", "consumers", "producers")
_CHECK = {"plain_words.py", "test_plain_words.py"}  # they name the retired terms
_SUFFIXES = {".md", ".py", ".lua", ".sql", ".yaml", ".yml", ".toml", ".html", ".js", ".css", ".service", ""}


class Term(NamedTuple):
    """A retired term, as a regular expression without regard to case, and what to write instead."""

    pattern: str
    instead: str


_EVENT = r"(?:events?|jobs?|entry|entries|deliver(?:y|ies)|archives?|snapshots?)"

RETIRED = (
    Term(r"\babsorb", "duplicate"),
    Term(r"\b(?:in[ -]?)?flight\b", "relay, or sent"),
    Term(r"\bcrews?\b|\blanes?\b", "worker, worker thread"),
    Term(r"(?<!lock )(?<!lock's )\bholders?\b", "owner"),
    Term(rf"\bhold(?:s|ing)? (?:the |its |their )?{_EVENT}|\bheld (?:by|back|{_EVENT})", "reserved"),
    Term(r"\bhand(?:s|ed|ing)? (?:it |them |(?:its|their) work |the job |jobs )?back", "requeue"),
    Term(
        r"\blet(?:s|ting)? (?:\w+ ){0,2}go\b|\bg[ai]v(?:e|es|en|ing) (?:it |them |(?:the|its) \w+ )?up\b",
        "release, stop trying",
    ),
    Term(r"\bsuspect|\baccus|\bblame|\bguilty|\bculprit|\bdeaths?\b", "poison candidate, crash count"),
    Term(r"\b(?:put|set)(?:s|ting)? (?:\w+ ){0,2}aside|\bharm(?:s|ed)\b|\bstranger?s?\b", "quarantine, unusable"),
    Term(r"\bstrand(?:s|ed)?\b|\bstrays?\b", "orphan"),
    Term(r"\bupkeep\b", "maintenance"),
    Term(r"\bpatien(?:t|ce)\b", "statement timeout"),
    Term(r"\bnarrow", "filter"),
    Term(r"\btall(?:y|ies)\b|\bstanding\b", "import statistics, import state"),
    Term(r"\bfates?\b|\bbecame of\b|\bbecomes? of\b|\bcome of it\b", "outcome"),
    Term(r"\brescu(?:e[sd]?|ing)\b", "salvage, requeue"),
    Term(
        rf"\b{_EVENT} (?:(?:is|are|was|were|be|been) )?refused|\brefused {_EVENT}|\brefusals?\b",
        "rejected, unsupported",
    ),
    Term(r"\bconfirm(?:s|ed|ing|ation)?\b", "acknowledge"),
    Term(r"\btold\b|(?<!\.)\btells?\b(?! apart)", "say which: reports, logs, returns"),
    Term(r"\bwho(?:m|so)?ever\b", "the subject itself: a process that …"),
    Term(r"\bin good order\b|\bmend(?:s|ed|ing)?\b", "correctly; fix, repair"),
    Term(r"\bgo(?:es|ing)? on (?:with|by|under|at|in|and)\b|\bgoes on\b", "continue"),
    Term(r"\bstands? (?:in|there|at|beside)\b", "is in"),
    Term(r"\bcome(?:s)? along\b|\bby itself alone\b|\bof an own\b|\bof its own\b|\bof their own\b", "has its own"),
    Term(r"\bas (?:it|they) (?:is|are) (?:said|told)\b|\bso many\b", "say how many"),
    Term(r"\bbelow a path\b|\bshall\b", "under a path; must"),
)
"""The terms and idioms that the product does not use."""

# Names in RQ, and in databases and outboxes of earlier versions.
_GIVEN_NAMES = re.compile(
    r"""['"](?:absorbed|confirmed|death)['"]"""
    "|event_outcomes_(?:refusal_has_a_reason|absorbed_is_duplicate)|entries_(?:un)?confirmed|TimerDeathPenalty|death_penalty"
)
_DOCSTRING_BEGINS = re.compile(r"(?:[-*] )?(?:What|Who|Whom|Whoever|Whose|Of)\b", re.I)


class Finding(NamedTuple):
    """A retired term, or a docstring that begins with one of the retired words."""

    file: str
    line: int
    found: str
    instead: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.found!r}: write {self.instead}"


def _files(names: tuple[str, ...]) -> Iterator[Path]:
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            skipped = "__pycache__" in file.parts or file.name.endswith(".lock") or file.name in _CHECK
            if file.is_file() and file.suffix in _SUFFIXES and not skipped:
                yield file


def retired_terms(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the words found and what to write instead, for each retired term in a text.

    An identifier counts like its words: `held_jobs` and `HeldJobs` are found like "held jobs".
    """
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", _GIVEN_NAMES.sub("", text))
    plain = re.sub(r"\n[ \t]*(?:#|--|//|\*)", "\n", plain)  # a sentence goes on in the next line of a comment
    for pattern, instead in RETIRED:
        for found in re.finditer(pattern.replace(" ", r"\s+") if "(?<!" not in pattern else pattern, plain, re.I):
            yield text_line(plain, found.start()), found[0], instead


def text_line(text: str, offset: int) -> int:
    """Return the number of the line, from 1, of an offset into a text."""
    return text.count("\n", 0, offset) + 1


def docstring_beginnings(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield each docstring that begins with What, Who, Whoever, Whose or Of, those of constants and fields included."""
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = node.value.value.strip()
            if _DOCSTRING_BEGINS.match(text):
                yield node.lineno, text.split("\n")[0], "a verb or a noun phrase that names the thing"


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all statements in a node, at any depth, without their expressions, which have no docstrings."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for statement in getattr(node, name, ()):
            yield statement
            yield from _statements(statement)


def findings(names: tuple[str, ...] = PRODUCT) -> list[Finding]:
    """Return every finding in these files and folders, which are relative to the project's root."""
    found = []
    for file in _files(names):
        text, path = file.read_text("utf-8"), str(file.relative_to(ROOT))
        found += [Finding(path, *one) for one in retired_terms(text)]
        if file.suffix == ".py":
            found += [Finding(path, *one) for one in docstring_beginnings(text)]
    return sorted(found)


def main() -> None:
    """Print each finding and their number."""
    found = findings(tuple(sys.argv[1:]) or PRODUCT)
    print(*found, f"{len(found)} findings", sep="\n")  # noqa: T201  # a program


if __name__ == "__main__":
    main()

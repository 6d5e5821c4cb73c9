"""The project's documents: their code blocks, tables, links and lengths.

`python -m tests.documents` prints the number of words of each document and every problem that the gate would report.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MOST_WORDS = 1_100
"""A document answers one question: a longer one is split."""

_BLOCK = re.compile(
    r"(?:^[ \t]*<!-- (?P<marker>[^\n]*?) -->\n)?^(?P<indent>[ \t]*)```(?P<language>\w*)\n(?P<text>.*?)^[ \t]*```$",
    re.M | re.S,
)
_FENCE = re.compile(r"^[ \t>]*(?:```|~~~)|<pre\b", re.M)
_LINK = re.compile(r"""\]\(<?([^)\s>]+)[^)]*\)|^ {0,3}\[[^]]+\]: *<?([^\s>]+)|(?:href|src)=["']([^"']+)""", re.M)
_NOT_RUN = "not run: "
"""Marks a block that no test runs; the reason follows."""


class Block(NamedTuple):
    """A fenced code block; `marker` is the HTML comment on the line before it, "" if there is none."""

    marker: str
    language: str
    text: str


def documents() -> list[str]:
    """Return the paths of all Markdown files of the project, relative to its root."""
    folders = [ROOT / name for name in (".ci", "producers", "consumers", "tests")]
    files = [*ROOT.iterdir(), *(file for folder in folders for file in folder.rglob("*"))]
    return sorted(str(file.relative_to(ROOT)) for file in files if file.suffix.lower() in {".md", ".markdown", ".rst"})


def text_of(document: str) -> str:
    """Return the text of a document, given its path relative to the project's root."""
    return (ROOT / document).read_text("utf-8")


def blocks(document: str) -> list[Block]:
    """Return all code blocks of a document, in order."""
    return [
        Block(found["marker"] or "", found["language"], re.sub(rf"^{found['indent']}", "", found["text"], flags=re.M))
        for found in _BLOCK.finditer(text_of(document))
    ]


def block(document: str, marker: str) -> str:
    """Return the code block below the comment `<!-- marker -->`, which only one block of the document has.

    Call it with two literal strings: the check of the documents reads from these calls which blocks are tested.
    """
    (found,) = (one.text for one in blocks(document) if one.marker == marker)
    return found


def table(document: str, marker: str) -> list[list[str]]:
    """Return the cells of the table below the comment `<!-- marker -->`, without its head."""
    (lines,) = re.findall(rf"<!-- {re.escape(marker)} -->\n((?:\|.*\n)+)", text_of(document))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines.splitlines()[2:]]


def words(text: str) -> int:
    """Return the number of words: runs of non-blank characters with a letter or digit. Code blocks count too."""
    return sum(1 for word in text.split() if re.search(r"\w", word))


def _anchors(document: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    text = re.sub(r"^[ \t]*```.*?^[ \t]*```$", "", text_of(document), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _broken_links(document: str) -> Iterator[str]:
    text = _BLOCK.sub("", text_of(document))
    for link in ("".join(found) for found in _LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / path if path else ROOT / document).resolve()
        if not target.exists() or not target.is_relative_to(ROOT.resolve()):
            yield f"{document}: the link {link} leads to no file"
        elif anchor and anchor not in _anchors(str(target.relative_to(ROOT.resolve()))):
            yield f"{document}: the link {link} leads to no heading"


@cache
def _tested_blocks(tests: Path) -> frozenset[tuple[str, str]]:
    """The document and marker of each call of `block` in a test."""
    found = set()
    for file in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "block":
                values = [one.value for one in node.args if isinstance(one, ast.Constant)]
                if len(values) == 2:
                    found.add((str(values[0]), str(values[1])))
    return frozenset(found)


def _untested_blocks(document: str) -> Iterator[str]:
    markers = [one.marker for one in blocks(document)]
    if len(_FENCE.findall(text_of(document))) != 2 * len(markers):
        yield f"{document}: fence each code block with three backticks, and a language of letters or none"
    for one in blocks(document):
        is_marked = len(one.marker) > len(_NOT_RUN) and one.marker.startswith(_NOT_RUN)
        if markers.count(one.marker) > 1 and not is_marked:
            yield f"{document}: two code blocks have the marker <!-- {one.marker} -->"
        if is_marked or (document, one.marker) in _tested_blocks(ROOT / "tests"):
            continue
        first = one.text.strip().split("\n")[0]
        yield f"{document}: no test reads the code block <!-- {one.marker} --> that begins with: {first}"


def problems_of(document: str) -> list[str]:
    """Return one line for each link without a target, each code block without a test, and too many words."""
    found = [*_broken_links(document), *_untested_blocks(document)]
    count = words(text_of(document))
    return [*found, f"{document}: {count:,} words, {MOST_WORDS:,} at most"] if count > MOST_WORDS else found


def main() -> None:
    """Print the number of words of each document, then the problems."""
    for document in documents():
        print(f"{words(text_of(document)):>6,}  {document}")  # noqa: T201  # a program
    for document in documents():
        print(*problems_of(document), sep="\n", end="\n" if problems_of(document) else "")  # noqa: T201  # a program


if __name__ == "__main__":
    main()

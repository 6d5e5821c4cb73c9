"""The documents: links, lengths and code blocks, and the check itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import documents
from tests.documents import MOST_WORDS, block, blocks, problems_of, table, words


@pytest.mark.parametrize("document", documents.documents())
def test_each_link_leads_somewhere_each_block_is_tested_and_no_document_is_too_long(document: str) -> None:
    """`python -m tests.documents` prints the same list."""
    assert problems_of(document) == []


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty document in an empty project, beside `other.md`, which has the heading "Two words"."""
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# Two `words`\n", "utf-8")
    return tmp_path / "page.md"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](missing.md)", "the link missing.md leads to no file"),
        ("[a](other.md#three-words)", "the link other.md#three-words leads to no heading"),
        ("[a](#nothing)", "the link #nothing leads to no heading"),
        ("```sh\nls\n```\n", "no test reads the code block <!--  --> that begins with: ls"),
        ("<!-- unknown -->\n```sh\nls\n```\n", "no test reads the code block <!-- unknown --> that begins with: ls"),
        ("word " * (MOST_WORDS + 1), "1,101 words, 1,100 at most"),
        ("[a][b]\n\n[b]: missing.md", "the link missing.md leads to no file"),
        ('[a](missing.md "title")', "the link missing.md leads to no file"),
        ('<img src="missing.png">', "the link missing.png leads to no file"),
        ("[a](../../../../etc/passwd)", "the link ../../../../etc/passwd leads to no file"),
        ("~~~\nls\n~~~\n", "fence each code block with three backticks, and a language of letters or none"),
        ("````\nls\n````\n", "fence each code block with three backticks, and a language of letters or none"),
        ("> ```\n> ls\n> ```\n", "fence each code block with three backticks, and a language of letters or none"),
        ("```c++\nls\n```\n", "fence each code block with three backticks, and a language of letters or none"),
        ("<!-- not run: -->\n```\nls\n```\n", "no test reads the code block <!-- not run: --> that begins with: ls"),
    ],
)
def test_a_problem_is_reported(page: Path, text: str, problem: str) -> None:
    page.write_text(text, "utf-8")
    assert problems_of("page.md") == [f"page.md: {problem}"]


@pytest.mark.parametrize(
    "text",
    [
        "[a](other.md) [b](other.md#two-words) [c](https://example.org/x)",
        "<!-- not run: a picture -->\n```text\n->\n```\n",
        "word " * MOST_WORDS,
    ],
)
def test_a_document_without_problems_has_none(page: Path, text: str) -> None:
    page.write_text(text, "utf-8")
    assert problems_of("page.md") == []


def test_blocks_and_tables_are_found_by_their_marker(page: Path) -> None:
    page.write_text("<!-- a -->\n```sh\none\n```\n\n* x:\n\n  <!-- b -->\n  ```text\n  two\n  ```\n", "utf-8")
    assert [(one.marker, one.text) for one in blocks("page.md")] == [("a", "one\n"), ("b", "two\n")]
    page.write_text("<!-- t -->\n| h | i |\n|---|---|\n| a | b c |\n| | `x \\| y` |\n", "utf-8")
    assert table("page.md", "t") == [["a", "b c"], ["", r"`x \| y`"]]


def test_a_marker_that_is_missing_is_an_error(page: Path) -> None:
    page.write_text("nothing", "utf-8")
    name = "page.md"
    with pytest.raises(ValueError, match="not enough values"):
        block(name, "a")


def test_punctuation_is_no_word() -> None:
    assert words("| a | b-c | -> | 1,100 |") == 3

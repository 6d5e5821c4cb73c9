"""The vocabulary of the product and of the tests, and the check itself."""

from __future__ import annotations

import pytest

from tests.plain_words import PRODUCT, docstring_beginnings, findings, retired_terms


@pytest.mark.parametrize("folder", [*PRODUCT, "tests"])
def test_no_retired_term_is_used(folder: str) -> None:
    """`python -m tests.plain_words FOLDER` prints the same list."""
    assert [str(finding) for finding in findings((folder,))] == []


@pytest.mark.parametrize(
    "text",
    [
        "the lane of a worker",
        "HeldJobs = 1",
        "def held_jobs",
        "its work is handed\nback: jobs are handed back",
        "# the event was refused",
        "class RefusedJob:",
        "Whoever reads this",
        "it goes on by itself",
        "# the event\n    # was refused",
        "-- handed\n-- back",
        "put the key aside",
        "held by a worker",
    ],
)
def test_a_retired_term_is_found(text: str) -> None:
    assert list(retired_terms(text)) != []


@pytest.mark.parametrize(
    "text", ["the connection was refused", "the lock holder", "planes", "tells apart", "outcome = 'absorbed'"]
)
def test_ordinary_english_is_no_retired_term(text: str) -> None:
    assert list(retired_terms(text)) == []


def test_a_finding_has_its_line() -> None:
    assert list(retired_terms("one\ntwo\na lane")) == [(3, "lane", "worker, worker thread")]


def test_a_docstring_that_begins_with_a_question_word_is_found() -> None:
    source = '''"""Of the module."""
def f():
    """What it does."""
class C:
    """Official text."""
    field = 1
    """- Whom it serves."""
'''
    assert [(line, text) for line, text, _ in docstring_beginnings(source)] == [
        (1, "Of the module."),
        (3, "What it does."),
        (7, "- Whom it serves."),
    ]

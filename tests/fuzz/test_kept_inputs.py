"""The inputs that fuzzing found most interesting, and those that once broke an invariant, keep all invariants."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuzz import api_requests, event_texts, old_files
from tests.fuzz.invariants import BrokenInvariant, failure_of, minimized, signature

_TARGETS = {"decode": event_texts, "import": old_files, "api": api_requests}


def _kept() -> list[tuple[str, bytes]]:
    """Return target and input of each line of kept_inputs.txt."""
    lines = Path(__file__).with_name("kept_inputs.txt").read_text("ascii").splitlines()
    return [(name, ast.literal_eval(shown)) for name, _, shown in (line.partition(" ") for line in lines)]


@pytest.fixture
def own_thread(database_url: str) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread for the API's event loop: the browser tests leave a running loop in the thread of the tests."""
    with ThreadPoolExecutor(1) as thread:
        yield thread
        thread.submit(api_requests.stop).result()


def _failures(kept: list[tuple[str, bytes]]) -> list[str]:
    failures = []
    for name, data in kept:
        error = failure_of(lambda data: _TARGETS[name].check(data, store=True), data)  # noqa: B023  # called at once
        failures += [f"{name} {data!r}: {error!r}"] if error else []
    return failures


def test_each_kept_input_keeps_the_invariants(own_thread: ThreadPoolExecutor) -> None:
    """Events and files are stored in the database too."""
    kept = _kept()
    assert own_thread.submit(_failures, kept).result() == []
    assert {name for name, _ in kept} == set(_TARGETS)
    assert len(kept) <= 60


def test_a_broken_invariant_has_the_place_of_its_check_and_a_small_input() -> None:
    """This text is no event. A check that requires one fails, in the same place for each part of the text."""

    def check(data: bytes) -> None:
        if b"\0" in data:
            raise BrokenInvariant("a NUL character")

    error = failure_of(check, b"abc\0def")
    assert error is not None
    assert signature(error).startswith("BrokenInvariant")
    assert minimized(check, b"abc\0def") == b"\0"
    assert failure_of(check, b"abc") is None

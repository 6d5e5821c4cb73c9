"""The inputs that fuzzing found most interesting, and those that once broke an invariant, keep all invariants."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuzz import api_requests
from tests.fuzz.invariants import TARGETS, failure_of, failures, reduced, require, signature


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


def test_each_kept_input_keeps_the_invariants(own_thread: ThreadPoolExecutor) -> None:
    """Events and files are stored in the database too."""
    kept = _kept()
    assert own_thread.submit(failures, kept).result() == []
    assert {name for name, _ in kept} == set(TARGETS)
    assert len(kept) <= 60


def test_a_broken_invariant_has_the_place_of_its_check_and_a_small_input() -> None:
    def check(data: bytes) -> None:
        require(b"\0" not in data, "a NUL character")

    error = failure_of(check, b"abc\0def")
    assert error is not None
    assert signature(error) == f"BrokenInvariant test_kept_inputs.py:{check.__code__.co_firstlineno + 1}"
    assert reduced(check, b"abc\0def") == b"\0"
    assert failure_of(check, b"abc") is None

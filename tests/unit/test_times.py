"""Pauses between retries."""

from __future__ import annotations

import random

import pytest

from producers.times import backoff_seconds


@pytest.mark.parametrize(("failures", "ceiling"), [(1, 0.2), (2, 0.4), (5, 3.2), (6, 5.0), (100_000, 5.0)])
def test_a_pause_doubles_up_to_a_limit_and_is_random(failures: int, ceiling: float) -> None:
    waits = [backoff_seconds(failures, first=0.2, last=5.0) for _ in range(200)]
    assert ceiling / 2 <= min(waits) < max(waits) <= ceiling
    assert max(waits) - min(waits) > ceiling / 4


def test_a_pause_does_not_use_the_programs_random_state() -> None:
    """The relay thread runs in a program that may have seeded it, such as a simulation."""
    before = random.getstate()
    backoff_seconds(1, first=0.2, last=5.0)
    assert random.getstate() == before

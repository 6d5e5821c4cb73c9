"""How long to wait before the next try."""

from __future__ import annotations

import pytest

from producers.times import backoff_seconds


@pytest.mark.parametrize(("failures", "ceiling"), [(1, 0.2), (2, 0.4), (5, 3.2), (6, 5.0), (100_000, 5.0)])
def test_it_doubles_up_to_a_limit_and_is_never_the_same_twice(failures: int, ceiling: float) -> None:
    waits = [backoff_seconds(failures, first=0.2, last=5.0) for _ in range(200)]
    assert ceiling / 2 <= min(waits) < max(waits) <= ceiling
    assert max(waits) - min(waits) > ceiling / 4

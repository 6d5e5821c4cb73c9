"""How long to wait before the next try."""

from __future__ import annotations

import random


def backoff_seconds(failures: int, *, first: float, last: float) -> float:
    """After so many failed tries in a row: `first`, twice as much after each further one, `last` at the most.

    From a half to all of that: those that failed together do not try again together.
    """
    ceiling = min(first * 2.0 ** min(failures - 1, 20), last)
    return random.uniform(ceiling / 2, ceiling)

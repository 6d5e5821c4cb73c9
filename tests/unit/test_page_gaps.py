"""Gaps of the curve, the drawn rows of each bucket, and daily profits, without a database."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.db.curve_queries import Bucket
from consumers.db.portfolio_queries import Snapshot
from consumers.web.page.curve import chosen, daily_changes, drawdown, starts_after_gaps
from consumers.web.page.responses import content
from consumers.web.page.signal_search import find


def _buckets(times: list[float], width: float, inside: int = 10**8) -> list[Bucket]:
    """Return the buckets that the query would return for rows with ids from 1 whose value is their time."""
    buckets: dict[int, list[tuple[float, int, float]]] = {}
    for row_id, at in enumerate(times, start=1):
        number = max(min(int(at // width), inside), -1)
        buckets.setdefault(number, []).append((at, row_id, at))
    return [
        Bucket(number, len(rows), rows[0], rows[-1], [rows[0], rows[-1]]) for number, rows in sorted(buckets.items())
    ]


def test_a_step_more_than_three_times_the_longest_of_the_ten_before_is_a_gap() -> None:
    """Exactly three times is none, and neither is a long step after fewer than ten."""
    even = [float(number) for number in range(11)]
    assert starts_after_gaps(_buckets([*even, 13.0], 0.5), 0.5)[12] is False
    assert starts_after_gaps(_buckets([*even, 13.1], 0.5), 0.5)[12] is True
    assert starts_after_gaps(_buckets([*even[:9], 40.0], 0.5), 0.5)[10] is False


def test_a_step_shorter_than_a_bucket_is_no_gap() -> None:
    """A screen could not show it."""
    times = [number * 0.01 for number in range(100)] + [3.0, 3.01]
    assert starts_after_gaps(_buckets(times, 5.0), 5.0) == {}
    assert starts_after_gaps(_buckets(times, 0.5), 0.5) == {101: True}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60, unique=True), st.floats(0.1, 1e5))
def test_every_wide_step_is_found_and_both_its_ends_are_drawn(times: list[float], width: float) -> None:
    """For any times and any width of the buckets."""
    times.sort()
    buckets = _buckets(times, width)
    wide = {row_id + 1 for row_id, (a, b) in enumerate(pairwise(times), start=1) if b - a > width}
    assert set(starts_after_gaps(buckets, width)) == wide
    drawn = chosen(buckets, 10**8 + 1)
    assert {end for row_id in wide for end in (row_id, row_id - 1)} <= set(drawn)


def test_only_the_nearest_rows_outside_the_range_are_drawn() -> None:
    """The last one before the range and the first one after it."""
    times = [-3.0, -2.0, 0.5, 1.5, 2.5, 3.5, 4.5]
    assert set(chosen(_buckets(times, 1.0, inside=3), 3)) == {2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    ("value", "peak", "lost"), [(75, 100, -0.25), (100, 100, 0), (-50, 100, -1.5), (-5, -1, None), (0, 0, None)]
)
def test_drawdown_is_the_lost_part_of_the_peak(value: float, peak: float, lost: float | None) -> None:
    """Without a positive peak there is no drawdown."""
    assert drawdown("value", value, peak) == lost


@given(st.lists(st.tuples(st.integers(1, 40), st.decimals(-1000, 1000, places=8)), min_size=1, max_size=30))
def test_daily_profits_and_losses_add_up_to_the_whole_change(steps: list[tuple[int, Decimal]]) -> None:
    """Exactly, also across gaps. The days add up to the whole time."""
    closes = []
    day = date(2026, 1, 1).toordinal()
    for number, (days, value) in enumerate(steps):
        day += days if number else 0
        moment = datetime(2026, 1, 1, tzinfo=UTC)
        closes.append(Snapshot(number, date.fromordinal(day), moment, value, Decimal(0), Decimal(0), Decimal(0), False))
    entries = daily_changes(closes)
    assert (entries[0].change, entries[0].days) == (None, None)
    assert sum((one.change for one in entries if one.change is not None), Decimal(0)) == steps[-1][1] - steps[0][1]
    assert sum(one.days or 0 for one in entries) == day - date(2026, 1, 1).toordinal()


def test_a_search_without_archives_finds_nothing() -> None:
    """And has no position to continue from."""
    assert find(iter([]), "x", None) == find(iter([]), "", None)


def test_the_page_has_the_hashes_of_the_chart_library() -> None:
    """Browsers load no other file: a new version of the library needs new hashes."""
    from base64 import b64encode
    from hashlib import sha256

    page = content("index.html").decode()
    for name in ("uplot.js", "uplot.css"):
        assert f'integrity="sha256-{b64encode(sha256(content(name)).digest()).decode()}"' in page

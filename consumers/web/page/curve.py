"""The equity curve of a portfolio, thinned to what a screen can show, its drawdown and gaps, and its daily profit.

* Drawdown of a snapshot: total value / highest total value up to it - 1, so 0 at a new high and -0.25 a quarter below
  it. It looks at every snapshot since the first, not at the drawn ones: the deepest one shown is the true one. It is
  None where the highest value is not positive.
* Thinning: the range is cut into buckets of equal time, about two pixels each; of each bucket the first and the last
  snapshot stay, that with the lowest and that with the highest value, and that with the deepest drawdown. Every point
  drawn is a snapshot with its exact amounts.
* Gap: the step between two consecutive snapshots is wider than a bucket, and their dates leave a whole day out, or it
  is longer than three times the longest of the ten steps before it.
* Close of a date: the last snapshot of that snapshot_date. A date's profit or loss is its close minus the close before
  it, in total value. When days without snapshots lie between, that close is of an earlier date than the day before:
  `days` says how many days the change took. The first close has none; a date without a snapshot has no entry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from itertools import pairwise

from sqlalchemy import Connection

from consumers.db import curve_queries
from consumers.db.curve_queries import Bucket, Range
from consumers.db.portfolio_queries import ALL_DATES, Snapshot, daily_closes

# Reading more rows than this at once takes seconds: then the daily closes are drawn, until the range is narrower.
MOST_SNAPSHOTS = 250_000
_STEPS_BEFORE = 10
_LONGER_THAN_USUAL = 3


@dataclass(frozen=True)
class Point:
    """A drawn snapshot, its drawdown, and whether a gap lies before it."""

    snapshot: Snapshot
    drawdown: float | None
    after_gap: bool


@dataclass(frozen=True)
class Curve:
    """Points, oldest first, with the nearest on either side of the range. `snapshots` is how many lie in the range.

    With `closes_only` the points are daily closes, the drawdown is that of the closes, and `snapshots` is None.
    """

    points: Sequence[Point]
    snapshots: int | None
    closes_only: bool


def curve(db: Connection, portfolio: int | None, over: Range, *, parts: bool = False) -> Curve:
    """The curve of a portfolio over a range; with `parts`, balance and invested keep their peaks too."""
    limit = MOST_SNAPSHOTS + 1
    if curve_queries.count_snapshots(db, portfolio, ALL_DATES, limit) < limit:
        return _of_snapshots(db, over, curve_queries.buckets(db, portfolio, over, parts=parts))
    dates = curve_queries.dates_around(over.since, over.until)
    if curve_queries.count_snapshots(db, portfolio, dates, limit) < limit:
        before = daily_closes(db, portfolio, (date.min, dates[0] - timedelta(days=1)))
        peak = max((float(close.total_value) for close in before), default=None)
        return _of_snapshots(db, over, curve_queries.buckets(db, portfolio, over, dates=dates, peak=peak, parts=parts))
    return _of_closes(daily_closes(db, portfolio))


def _of_snapshots(db: Connection, over: Range, buckets: Sequence[Bucket]) -> Curve:
    kept = chosen(buckets, over.buckets)
    gaps = starts_after_gaps(buckets, over.bucket_seconds)
    rows = curve_queries.snapshots(db, list(kept))
    left_out = [False] + [days_left_out(before, row) for before, row in pairwise(rows)]
    points = [
        Point(row, drawdown(float(row.total_value), kept[row.id]), row.id in gaps and (gaps[row.id] or alone))
        for row, alone in zip(rows, left_out, strict=True)
    ]
    inside = sum(bucket.snapshots for bucket in buckets if 0 <= bucket.number < over.buckets)
    return Curve(points, inside, closes_only=False)


def _of_closes(closes: Sequence[Snapshot]) -> Curve:
    points: list[Point] = []
    peak = Decimal("-Infinity")
    for number, close in enumerate(closes):
        peak = max(peak, close.total_value)
        gap = number > 0 and days_left_out(closes[number - 1], close)
        points.append(Point(close, drawdown(float(close.total_value), float(peak)), gap))
    return Curve(points, None, closes_only=True)


def drawdown(value: float, peak: float) -> float | None:
    """The part of the highest value that is lost: 0 or negative; None where the highest is not positive."""
    return value / peak - 1 if peak > 0 else None


def days_left_out(before: Snapshot, after: Snapshot) -> bool:
    return (after.snapshot_date - before.snapshot_date).days > 1


def chosen(buckets: Sequence[Bucket], inside: int) -> dict[int, float]:
    """The rows to draw, by id, with the highest value up to each: of the outer buckets only the nearest row."""
    rows: dict[int, float] = {}
    for bucket in buckets:
        if bucket.number < 0:
            chosen_ones = [bucket.last]
        elif bucket.number >= inside:
            chosen_ones = [bucket.first]
        else:
            chosen_ones = [bucket.first, bucket.last, *bucket.extremes]
        rows |= {int(row_id): peak for _, row_id, peak in chosen_ones}
    return rows


def starts_after_gaps(buckets: Sequence[Bucket], bucket_seconds: float) -> dict[int, bool]:
    """Rows, by id, that follow a step wider than a bucket, and whether that is far longer than the steps before it.

    Such a step lies between the last row of a bucket and the first of the next one that has any. Inside a bucket the
    mean step stands for all.
    """
    wide: dict[int, bool] = {}
    steps: deque[float] = deque(maxlen=_STEPS_BEFORE)
    seen = 0
    for number, bucket in enumerate(buckets):
        if number:
            step = bucket.first[0] - buckets[number - 1].last[0]
            if step > bucket_seconds:
                unusual = seen >= _STEPS_BEFORE and step > _LONGER_THAN_USUAL * max(steps)
                wide[int(bucket.first[1])] = unusual
            steps.append(step)
            seen += 1
        inner = bucket.snapshots - 1
        if inner:
            steps.append((bucket.last[0] - bucket.first[0]) / inner)
            seen += inner
    return wide


@dataclass(frozen=True)
class Day:
    """A date's close, its profit or loss in the account's currency, and over how many days that came about."""

    close: Snapshot
    profit_loss: Decimal | None
    days: int | None


def daily_profit_loss(closes: Sequence[Snapshot]) -> list[Day]:
    """One entry a close, oldest first as they are given."""
    first = [Day(close, None, None) for close in closes[:1]]
    return first + [
        Day(close, close.total_value - before.total_value, (close.snapshot_date - before.snapshot_date).days)
        for before, close in pairwise(closes)
    ]

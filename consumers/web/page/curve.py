"""The curve of a portfolio's worth, reduced to the points that a screen can show, its drawdown, gaps and daily change.

* Worth: one of the measures of consumers.db.measures.
* Drawdown of a snapshot: worth / highest worth so far - 1. It is 0 at a new high and -0.25 if a quarter is
  lost. It uses every snapshot since the first, not only the drawn ones, so the deepest drawdown shown is exact. It is
  None if the highest worth is not positive, and for `profit_loss`, whose peak is no invested money.
* Reduction: the range is divided into buckets of equal time, about two pixels each. Each bucket keeps its first and
  last snapshot, those with the lowest and the highest value, and the one with the deepest drawdown. Every drawn point
  is a stored snapshot with its exact amounts.
* Gap: the step between two consecutive snapshots is longer than a bucket and either skips a whole date, or is more than
  three times as long as the longest of the ten steps before it.
* Close of a date: the last snapshot of that snapshot_date. The change of a date is its close minus the previous close.
  `days` is the number of days between the two closes: more than 1 if dates without snapshots lie between them. The
  first close has no change; a date without a snapshot has no entry. Only a change of `profit_loss` is free of deposits.
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
from consumers.db.measures import Measure
from consumers.db.portfolio_queries import ALL_DATES, Snapshot, daily_closes

# Reading more rows takes seconds: then only the daily closes are drawn, until the user zooms in.
MOST_SNAPSHOTS = 250_000
_STEPS_BEFORE = 10
_LONGER_THAN_USUAL = 3


@dataclass(frozen=True)
class Point:
    """Drawn snapshot, its drawdown (0 or negative), and whether a gap is before it."""

    snapshot: Snapshot
    drawdown: float | None
    after_gap: bool


@dataclass(frozen=True)
class Curve:
    """Points of a range, oldest first, plus the nearest one on either side of it.

    `snapshots` is the number of snapshots in the range. If `closes_only`, the points are daily closes, the drawdown is
    that of the closes, and `snapshots` is None.
    """

    points: Sequence[Point]
    snapshots: int | None
    closes_only: bool


def curve(db: Connection, portfolio: int | None, over: Range, measure: Measure, *, parts: bool = False) -> Curve:
    """Return the curve of a portfolio over a range. With `parts`, the extremes of balance and invested are kept too."""
    limit = MOST_SNAPSHOTS + 1
    if curve_queries.count_snapshots(db, portfolio, ALL_DATES, limit) < limit:
        return _of_snapshots(db, over, measure, curve_queries.buckets(db, portfolio, over, measure, parts=parts))
    dates = curve_queries.dates_around(over.since, over.until)
    if curve_queries.count_snapshots(db, portfolio, dates, limit) < limit:
        before = daily_closes(db, portfolio, measure, (date.min, dates[0] - timedelta(days=1)))
        peak = max((float(close.worth) for close in before), default=None)
        found = curve_queries.buckets(db, portfolio, over, measure, dates=dates, peak=peak, parts=parts)
        return _of_snapshots(db, over, measure, found)
    return _of_closes(daily_closes(db, portfolio, measure), measure)


def _of_snapshots(db: Connection, over: Range, measure: Measure, buckets: Sequence[Bucket]) -> Curve:
    kept = chosen(buckets, over.buckets)
    gaps = starts_after_gaps(buckets, over.bucket_seconds)
    rows = curve_queries.snapshots(db, list(kept), measure)
    left_out = [False] + [days_left_out(before, row) for before, row in pairwise(rows)]
    points = [
        Point(row, drawdown(measure, float(row.worth), kept[row.id]), row.id in gaps and (gaps[row.id] or alone))
        for row, alone in zip(rows, left_out, strict=True)
    ]
    inside = sum(bucket.snapshots for bucket in buckets if 0 <= bucket.number < over.buckets)
    return Curve(points, inside, closes_only=False)


def _of_closes(closes: Sequence[Snapshot], measure: Measure) -> Curve:
    points: list[Point] = []
    peak = Decimal("-Infinity")
    for number, close in enumerate(closes):
        peak = max(peak, close.worth)
        gap = number > 0 and days_left_out(closes[number - 1], close)
        points.append(Point(close, drawdown(measure, float(close.worth), float(peak)), gap))
    return Curve(points, None, closes_only=True)


def drawdown(measure: Measure, worth: float, peak: float) -> float | None:
    """Return the lost part of the highest worth, 0 or negative; None for profit/loss, or if `peak` is not positive."""
    return worth / peak - 1 if peak > 0 and measure != "profit_loss" else None


def days_left_out(before: Snapshot, after: Snapshot) -> bool:
    """Return whether at least one whole date lies between two snapshots."""
    return (after.snapshot_date - before.snapshot_date).days > 1


def chosen(buckets: Sequence[Bucket], inside: int) -> dict[int, float]:
    """Return the ids of the rows to draw, with the highest value up to each. An outer bucket gives its nearest row."""
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
    """Return the ids of rows that follow a step longer than a bucket, and whether that step is unusually long.

    Such a step lies between the last row of a bucket and the first row of the next one. The steps inside a bucket are
    not known one by one: their mean is used.
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
    """Close of a date, its change in the account's currency, and the days since the previous close."""

    close: Snapshot
    change: Decimal | None
    days: int | None


def daily_changes(closes: Sequence[Snapshot]) -> list[Day]:
    """Return one entry per close, in the order given: oldest first."""
    first = [Day(close, None, None) for close in closes[:1]]
    return first + [
        Day(close, close.worth - before.worth, (close.snapshot_date - before.snapshot_date).days)
        for before, close in pairwise(closes)
    ]

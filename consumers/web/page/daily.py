"""Daily profit and loss, from daily closes.

The close of a date is the last snapshot of that snapshot_date. The profit or loss of a date is its close minus the
close before it, in total value. That close is of the day before or, when days without snapshots lie between, of an
earlier one: `days` says how many days the change took. The first close has none; a date without a snapshot has no
entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

from consumers.db.page_queries import Snapshot


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

"""Times and dates that a command takes, relative to the present, on days of 23 and 25 hours too."""

from __future__ import annotations

from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

import pytest

from consumers.cli.options import read_date, read_time

BERLIN = ZoneInfo("Europe/Berlin")  # clocks: forward on 2026-03-29 at 02:00, back on 2026-10-25 at 03:00
HAVANA = ZoneInfo("America/Havana")  # clocks: forward on 2026-03-08 at 00:00, back on 2026-11-01 at 01:00


def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text + "+00:00")


@pytest.mark.parametrize(
    ("text", "zone", "now", "instant"),
    [
        ("30m", UTC, "2026-11-29T12:00", "2026-11-29T11:30"),
        ("2h", UTC, "2026-11-29T12:00", "2026-11-29T10:00"),
        ("7d", UTC, "2026-11-29T12:00", "2026-11-22T12:00"),
        ("2w", UTC, "2026-11-29T12:00", "2026-11-15T12:00"),
        (" 7D ", UTC, "2026-11-29T12:00", "2026-11-22T12:00"),
        ("0d", UTC, "2026-11-29T12:00", "2026-11-29T12:00"),
        ("today", UTC, "2026-11-29T23:59", "2026-11-29T00:00"),
        ("Yesterday", UTC, "2026-11-29T00:00", "2026-11-28T00:00"),
        ("today", BERLIN, "2026-11-28T23:30", "2026-11-28T23:00"),  # it is tomorrow there
        ("yesterday", BERLIN, "2026-11-28T23:30", "2026-11-27T23:00"),
        ("yesterday", BERLIN, "2026-03-30T10:00", "2026-03-28T23:00"),  # a day of 23 hours, until 22:00 UTC
        ("today", BERLIN, "2026-03-30T10:00", "2026-03-29T22:00"),
        ("yesterday", BERLIN, "2026-10-26T10:00", "2026-10-24T22:00"),  # a day of 25 hours, until 23:00 UTC
        ("today", BERLIN, "2026-10-26T10:00", "2026-10-25T23:00"),
        ("7d", BERLIN, "2026-03-30T10:00", "2026-03-23T11:00"),  # noon there, both times
        ("7d", BERLIN, "2026-10-26T11:00", "2026-10-19T10:00"),
        ("24h", BERLIN, "2026-10-26T11:00", "2026-10-25T11:00"),
        ("1d", BERLIN, "2026-03-30T00:30", "2026-03-29T01:30"),  # 02:30 does not exist on the day before
        ("2h", BERLIN, "2026-10-25T02:30", "2026-10-25T00:30"),  # 03:30 there, and 02:30 for the first time
        ("today", HAVANA, "2026-03-08T12:00", "2026-03-08T05:00"),  # the day begins at 01:00
        ("today", HAVANA, "2026-11-01T12:00", "2026-11-01T04:00"),  # the day has its first hour twice
    ],
)
def test_a_relative_time_is_an_instant(text: str, zone: ZoneInfo, now: str, instant: str) -> None:
    assert read_time(text, zone, now=_utc(now)).astimezone(UTC) == _utc(instant)


@pytest.mark.parametrize("text", ["2026-11-22T17:00", "2026-11-22T17:00+01:00", "2026-11-22", "2026-11-22 17:00:00Z"])
def test_an_absolute_time_keeps_its_offset_or_has_none(text: str) -> None:
    """Its zone is chosen later."""
    assert read_time(text, BERLIN) == datetime.fromisoformat(text)
    assert read_time(text, BERLIN).utcoffset() == datetime.fromisoformat(text).utcoffset()


@pytest.mark.parametrize(
    "text",
    ["", "tomorrow", "7", "7y", "-7d", "d", "1.5h", "7 days", "1733000000", "20261122", "9999999d", "9999999w", "٧d"],
)
def test_another_text_is_not_a_time(text: str) -> None:
    """A number without a unit neither, which would be seconds since 1970. The message has each form."""
    with pytest.raises(ValueError, match="is not a time: write for example 2026-11-22T17:00, ") as caught:
        read_time(text, UTC)
    assert str(caught.value).endswith("2026-11-22T17:00+01:00, 7d, 2h, 30m, today or yesterday")


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2026-11-22", date(2026, 11, 22)),
        ("7d", date(2026, 11, 22)),
        ("2W", date(2026, 11, 15)),
        ("today", date(2026, 11, 29)),
        ("yesterday", date(2026, 11, 28)),
    ],
)
def test_a_relative_date_is_a_day(text: str, day: date) -> None:
    assert read_date(text, date(2026, 11, 29)) == day


@pytest.mark.parametrize("text", ["june", "2h", "30m", "7", "9999999d", "2026-02-30"])
def test_another_text_is_not_a_date(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a date: write for example 2026-11-22, 7d, 2w, today or yesterday$"):
        read_date(text, date(2026, 11, 29))

"""Pauses between retries, names of time zones, and times that a clock has shown."""

from __future__ import annotations

import math
import random
import re
import sys
import time
import tomllib
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from producers.times import backoff_seconds, deadline_after, read_back, wall_clock, zone_named
from tests.documents import ROOT


@pytest.mark.parametrize(("failures", "ceiling"), [(1, 0.2), (2, 0.4), (5, 3.2), (6, 5.0), (100_000, 5.0)])
def test_a_pause_doubles_up_to_a_limit_and_is_random(failures: int, ceiling: float) -> None:
    waits = [backoff_seconds(failures, first=0.2, last=5.0) for _ in range(200)]
    assert ceiling / 2 <= min(waits) < max(waits) <= ceiling
    assert max(waits) - min(waits) > ceiling / 4


def test_a_wait_ends_after_its_timeout_or_never() -> None:
    """NaN is an error: such a wait would never end."""
    before = time.monotonic()
    deadline = deadline_after(5.0)
    assert deadline is not None
    assert before + 5.0 <= deadline <= time.monotonic() + 5.0
    assert deadline_after(None) is None
    with pytest.raises(ValueError, match="timeout: must be a number of seconds, not NaN"):
        deadline_after(math.nan)


def test_a_pause_does_not_use_the_programs_random_state() -> None:
    """The relay thread runs in a program that may have seeded it, such as a simulation."""
    before = random.getstate()
    backoff_seconds(1, first=0.2, last=5.0)
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Europe/Berln", "Europe/Berlin"),
        ("Berlin", "Europe/Berlin"),
        ("Germany/Berlin", "Europe/Berlin"),
        ("europe/berlin ", "Europe/Berlin"),
        ("America/NewYork", "America/New_York"),
        ("new york", "America/New_York"),
        ("Asia/Tokio", "Asia/Tokyo"),
        ("utc ", "UTC"),
        ("Jappan", "Japan"),
        ("Port-au-Prince", "America/Port-au-Prince"),
        ("right/Europe/Berlin", "Europe/Berlin"),
    ],
)
def test_a_nearly_right_time_zone_gets_a_suggestion(name: str, meant: str) -> None:
    """One that cannot be found by another spelling on any file system."""
    with pytest.raises(ValueError, match=rf"^must be the name of an IANA time zone: did you mean {meant}\?$"):
        zone_named(name)


@pytest.mark.parametrize(
    "name",
    [
        "Middle/Earth",
        "EST9",
        "W. Europe Standard Time",
        "/",
        "../../etc/passwd",
        "+05:30",
        "UTC+15",
        "-13",
        "Etc/GMT+15",
        "Etc/GMT-15",
        "GMT05",
        "localtime",
        "/etc/localtime",
        "posixrules",
    ],
)
def test_any_other_name_gets_an_example(name: str) -> None:
    """Also a file of the system that is no zone, and an offset that no zone has."""
    with pytest.raises(ValueError, match="^must be the name of an IANA time zone, such as Europe/Berlin$"):
        zone_named(name)


@pytest.mark.parametrize(
    ("name", "offset", "zone"),
    [
        ("GMT+2", "+02:00", "Etc/GMT-2"),
        ("UTC+1", "+01:00", "Etc/GMT-1"),
        ("utc -5", "-05:00", "Etc/GMT+5"),
        ("+02:00", "+02:00", "Etc/GMT-2"),
        ("-0300", "-03:00", "Etc/GMT+3"),
        ("UTC+14", "+14:00", "Etc/GMT-14"),
    ],
)
def test_a_fixed_offset_is_named_with_its_zone(name: str, offset: str, zone: str) -> None:
    """The names of these zones have the opposite sign, so the offset is shown too."""
    expected = f"for the fixed offset {offset}, write {zone} (the sign in these names is the opposite one)"
    with pytest.raises(ValueError, match=f"; {re.escape(expected)}$"):
        zone_named(name)
    assert datetime(2026, 1, 1, tzinfo=zone_named(zone)).isoformat().endswith(offset)


def test_an_offset_of_zero_is_utc() -> None:
    with pytest.raises(ValueError, match=r"for the fixed offset \+00:00, write UTC$"):
        zone_named("+00:00")


_HOUR = timedelta(hours=1)
_BERLIN = ZoneInfo("Europe/Berlin")
# At this instant and an hour later, clocks in Berlin show 02:30.
_FIRST = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("after", "instant"),
    [
        (None, _FIRST),
        (_FIRST - _HOUR, _FIRST),
        (_FIRST, _FIRST),
        (_FIRST + _HOUR / 2, _FIRST + _HOUR),
        (_FIRST + _HOUR, _FIRST + _HOUR),
        (_FIRST + 2 * _HOUR, _FIRST),
    ],
)
def test_a_time_that_occurs_twice_is_the_first_one_that_continues_the_series(
    after: datetime | None, instant: datetime
) -> None:
    """If neither continues it, the first one is taken. The result has a fixed offset."""
    shown = [wall_clock(instant, _BERLIN) for instant in (_FIRST, _FIRST + _HOUR)]
    assert [(one, one.fold) for one in shown] == [(datetime(2026, 10, 25, 2, 30), 0)] * 2
    read = read_back(datetime(2026, 10, 25, 2, 30), _BERLIN, after, "timestamp")
    assert read == instant
    assert read.isoformat() == ("2026-10-25T02:30:00+02:00" if instant == _FIRST else "2026-10-25T02:30:00+01:00")


def test_a_time_that_does_not_occur_has_the_offset_before_the_gap() -> None:
    read = read_back(datetime(2026, 3, 29, 2, 30), _BERLIN, None, "timestamp")
    assert read.isoformat() == "2026-03-29T02:30:00+01:00"


@pytest.fixture
def _without_files_of_the_system() -> Iterator[None]:
    before = zoneinfo.TZPATH
    zoneinfo.reset_tzpath(to=[])
    zoneinfo.ZoneInfo.clear_cache()
    yield
    zoneinfo.reset_tzpath(to=before)
    zoneinfo.ZoneInfo.clear_cache()


@pytest.mark.usefixtures("_without_files_of_the_system")
def test_zones_come_from_the_package_tzdata_on_a_machine_without_zone_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a slim image. If the package was removed, the message names it."""
    assert zone_named("Europe/Berlin").key == "Europe/Berlin"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert "tzdata" in project["dependencies"]
    zoneinfo.ZoneInfo.clear_cache()
    for module in [name for name in sys.modules if name.split(".")[0] == "tzdata"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tzdata", None)
    with pytest.raises(ValueError, match="no time zone data: run pip install tzdata$"):
        zone_named("Europe/Berlin")

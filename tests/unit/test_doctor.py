"""Health checks that need no server: outbox, clocks and RQ; durations and sizes as text; masked passwords."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.ops import doctor, settings_health
from consumers.ops.checks import HealthCheck, checks_or_error, duration, size
from consumers.ops.database_health import clock_check
from consumers.ops.masking import Mask
from consumers.ops.outbox_health import outbox_of_settings
from consumers.terminal import print_checks
from producers.outbox import Outbox
from tests.factories import a_snapshot

NO_SECRETS = Mask(())


def _outbox_checks() -> dict[str, HealthCheck]:
    health = outbox_of_settings(ask_relay=True)
    assert health is not None
    return {one.name: one for one in health.checks()}


def test_outbox_check_counts_waiting_entries_and_reports_a_missing_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old entries fail without a relay, and are a warning with one. Young entries are ok."""
    path = tmp_path / "outbox.db"
    monkeypatch.setenv("HISTORY_OUTBOX", str(path))
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot(), a_snapshot(after=timedelta(1))])
        young = _outbox_checks()
        _age(path, seconds=3600)
        unrelayed = _outbox_checks()
        lock = outbox.relay_lock()
        assert lock.acquire()
        relayed = _outbox_checks()
        lock.release()
        _age(path, seconds=100_000)
        assert lock.acquire()
        very_old = _outbox_checks()
        lock.release()
        assert lock.acquire()  # the check has released it
        lock.release()

    assert [one["outbox"].state for one in (young, unrelayed, relayed, very_old)] == ["ok", "fail", "warn", "fail"]
    assert young["outbox"].found.startswith("2 pending, 0 sent, the oldest ")
    assert "no process sends them" in unrelayed["outbox"].found
    assert "60 min old" in relayed["outbox"].found
    assert young["outbox rejections"].state == "ok"


def test_rejected_entries_in_an_outbox_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "outbox.db"
    monkeypatch.setenv("HISTORY_OUTBOX", str(path))
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot()])
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO outcomes VALUES (1, 1, NULL, 'why')")
    db.close()
    found = _outbox_checks()["outbox rejections"]
    assert (found.state, found.found) == ("warn", "1 (discarded ones included)")


def test_a_dotenv_file_that_cannot_be_read_is_the_only_check() -> None:
    """Without the settings, no other part can be found."""
    Path(".env").write_bytes(b"HISTORY_QUEUE=\xff\n")
    (check,) = doctor.diagnose(list)
    assert (check.name, check.state, check.found) == ("settings", "fail", ".env cannot be read: UnicodeDecodeError")
    assert check.advice == "correct the file .env in this folder"


@pytest.mark.parametrize(
    ("ahead", "state", "found"),
    [
        (0.4, "ok", "within 5 s"),
        (-4.0, "ok", "within 5 s"),
        (90.0, "warn", "90 s ahead of this machine"),
        (-90.0, "warn", "90 s behind this machine"),
        (7200.0, "fail", "2 h ahead of this machine"),
        (-400.0, "fail", "6 min behind this machine"),
    ],
)
def test_clock_check_warns_above_5_seconds_and_fails_above_5_minutes(ahead: float, state: str, found: str) -> None:
    check = clock_check(ahead)
    assert (check.state, found in check.found) == (state, True)


@given(password=st.text(min_size=8).filter(lambda text: text.splitlines() == [text]))
def test_mask_hides_every_spelling_of_a_password(password: str) -> None:
    """Plain or percent-encoded; from a URL's login or query, or from POSTGRES_PASSWORD."""
    encoded = quote(password.encode("utf-8", "replace"), safe="")
    environment = {
        "DATABASE_URL": f"postgresql://u:{encoded}@h/d",
        "REDIS_URL": f"redis://h?password={encoded}-in-query",
        "POSTGRES_PASSWORD": password,
    }
    shown = Mask.of(environment).masked_first_line(Exception(f"no {password} no {encoded} no {encoded}-in-query no"))
    assert password not in shown
    assert encoded not in shown


def test_defect_in_a_check_does_not_hide_the_checks_before_it() -> None:
    """The defect becomes a failed check."""

    def broken() -> Iterator[HealthCheck]:
        yield HealthCheck("first", "ok", "fine")
        raise ZeroDivisionError("a defect")

    checks = list(checks_or_error("broken", broken, NO_SECRETS, advice="what to do"))
    unknown = list(checks_or_error("broken", broken, NO_SECRETS, unknown=(ZeroDivisionError,)))
    assert checks == [HealthCheck("first", "ok", "fine"), HealthCheck("broken", "fail", "a defect", "what to do")]
    assert (unknown[1].state, unknown[1].found) == ("unknown", "cannot be read: a defect")


@pytest.mark.parametrize(("version", "state"), [("3.0.0", "ok"), ("3.0.9", "ok"), ("4.0.0", "fail"), ("3.1", "fail")])
def test_untested_version_of_rq_fails(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    monkeypatch.setattr(settings_health, "VERSION", version)
    (check,) = settings_health.rq_checks()
    assert (check.state, version in check.found, bool(check.advice)) == (state, True, state == "fail")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "0 s"), (119, "119 s"), (125, "2 min"), (7300, "2 h"), (3 * 86400 + 7300, "3 d 2 h")]
)
def test_duration_is_shown_in_its_largest_units(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_sizes_are_shown_in_mib_and_gib() -> None:
    assert (size(512), size(1536 * 1024), size(3 * 2**30)) == ("0.5 KiB", "1.5 MiB", "3.0 GiB")


def test_each_check_is_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Also if its text is long, looks like a style of rich, or contains control characters."""
    checks = [
        HealthCheck("name", "fail", "[red]" + 400 * "x" + "\x1b[2J\n", "do"),
        HealthCheck("other", "warn", "y"),
        HealthCheck("z", "ok", ""),
    ]
    print_checks([{"name": one.name, "status": one.state, "found": one.found, "advice": one.advice} for one in checks])
    assert capsys.readouterr().out.splitlines() == [
        "fail  name   [red]" + 400 * "x" + "�[2J� → do",
        "warn  other  y",
        "ok    z",
        "1 ok, 1 warn, 1 fail",
    ]


def _age(path: Path, *, seconds: float) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE entries SET recorded_at = ?", (time.time() - seconds,))
    db.close()

"""Facts of the doctor that need no server: the outbox, clocks, numbers as text; and that no password is shown."""

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
from consumers.ops.database_health import clock_fact
from consumers.ops.facts import Fact, duration, facts_or_error, size
from consumers.ops.masking import Mask
from consumers.ops.outbox_health import outbox_of_settings
from consumers.terminal import print_checks
from producers.errors import OutboxOutdated
from producers.outbox import Outbox
from tests.factories import a_snapshot
from tests.unit.test_outbox import write_outbox_of_before

NO_SECRETS = Mask(())


def _outbox_facts() -> dict[str, Fact]:
    health = outbox_of_settings(ask_relay=True)
    assert health is not None
    return {fact.name: fact for fact in health.facts()}


def test_an_outbox_counts_what_waits_and_says_that_nobody_sends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old entries without a relay are wrong; with one, they are a warning; young ones are fine."""
    path = tmp_path / "outbox.db"
    monkeypatch.setenv("HISTORY_OUTBOX", str(path))
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot(), a_snapshot(after=timedelta(1))])
        young = _outbox_facts()
        _age(path, seconds=3600)
        forsaken = _outbox_facts()
        lock = outbox.relay_lock()
        assert lock.acquire()
        relayed = _outbox_facts()
        lock.release()
        _age(path, seconds=100_000)
        assert lock.acquire()
        very_old = _outbox_facts()
        lock.release()
        assert lock.acquire()  # looking does not keep it
        lock.release()

    assert [one["outbox"].state for one in (young, forsaken, relayed, very_old)] == ["ok", "fail", "warn", "fail"]
    assert young["outbox"].found.startswith("2 pending, 0 sent, the oldest ")
    assert "no process sends them" in forsaken["outbox"].found
    assert "60 min old" in relayed["outbox"].found
    assert young["outbox rejections"].state == "ok"


def test_an_outbox_of_an_earlier_release_is_reported_once_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its controller may still run."""
    path = tmp_path / "deep" / "outbox.db"
    write_outbox_of_before(path, 2)
    monkeypatch.setenv("HISTORY_OUTBOX", str(path))
    monkeypatch.setenv("HISTORY_HOME", str(path))  # a file, so that no server is started
    facts = doctor.diagnose(list)
    assert [(one.name, one.state) for one in facts if "earlier release" in one.found] == [("outbox", "warn")]
    assert [one.name for one in facts if one.name.startswith("outbox")] == ["outbox"]
    with pytest.raises(OutboxOutdated):
        Outbox(path)


def test_rejections_in_an_outbox_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for a person."""
    path = tmp_path / "outbox.db"
    monkeypatch.setenv("HISTORY_OUTBOX", str(path))
    with Outbox(path) as outbox:
        outbox.append("bot", [a_snapshot()])
    with sqlite3.connect(path) as db:
        db.execute("UPDATE entries SET state = 'rejected', reason = 'why', settled_at = 1")
    db.close()
    fact = _outbox_facts()["outbox rejections"]
    assert (fact.state, fact.found) == ("warn", "1")


@pytest.mark.parametrize(
    ("ahead", "state", "found"),
    [
        (0.4, "ok", "as ours"),
        (-4.0, "ok", "as ours"),
        (90.0, "warn", "90 s ahead of ours"),
        (-90.0, "warn", "90 s behind ours"),
        (7200.0, "fail", "2 h ahead of ours"),
        (-400.0, "fail", "6 min behind ours"),
    ],
)
def test_a_clock_that_differs_is_reported(ahead: float, state: str, found: str) -> None:
    """Seconds do not matter, minutes do."""
    fact = clock_fact(ahead)
    assert (fact.state, found in fact.found) == (state, True)


@given(password=st.text(min_size=8).filter(lambda text: text.splitlines() == [text]))
def test_no_spelling_of_a_password_gets_through(password: str) -> None:
    """Raw, or percent-encoded, from a URL's login or its query, or from POSTGRES_PASSWORD."""
    encoded = quote(password.encode("utf-8", "replace"), safe="")
    environment = {
        "DATABASE_URL": f"postgresql://u:{encoded}@h/d",
        "REDIS_URL": f"redis://h?password={encoded}-in-query",
        "POSTGRES_PASSWORD": password,
    }
    told = Mask.of(environment).masked_first_line(Exception(f"no {password} no {encoded} no {encoded}-in-query no"))
    assert password not in told
    assert encoded not in told


def test_one_reading_that_fails_hides_nothing_of_the_others() -> None:
    """A defect is a failed fact; facts that were read before it stand."""

    def broken() -> Iterator[Fact]:
        yield Fact("first", "ok", "fine")
        raise ZeroDivisionError("a defect")

    facts = list(facts_or_error("broken", broken, NO_SECRETS, advice="what to do"))
    unknown = list(facts_or_error("broken", broken, NO_SECRETS, unknown=(ZeroDivisionError,)))
    assert facts == [Fact("first", "ok", "fine"), Fact("broken", "fail", "a defect", "what to do")]
    assert (unknown[1].state, unknown[1].found) == ("unknown", "cannot be read: a defect")


@pytest.mark.parametrize(("version", "state"), [("3.0.0", "ok"), ("3.0.9", "ok"), ("4.0.0", "fail"), ("3.1", "fail")])
def test_an_rq_that_the_worker_refuses_is_wrong(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    monkeypatch.setattr(settings_health, "VERSION", version)
    (fact,) = settings_health.rq_facts()
    assert (fact.state, version in fact.found, bool(fact.advice)) == (state, True, state == "fail")


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.2, "0 s"), (119, "119 s"), (125, "2 min"), (7300, "2 h"), (3 * 86400 + 7300, "3 d 2 h")]
)
def test_a_duration_is_shown_in_units_that_matter(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_sizes_are_shown_in_mib_and_gib() -> None:
    assert (size(1536 * 1024), size(3 * 2**30)) == ("1.5 MiB", "3.0 GiB")


def test_each_check_is_one_line_in_a_pipe_whatever_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Long, with what would be a style, and with what would steer a terminal."""
    facts = [
        Fact("name", "fail", "[red]" + 400 * "x" + "\x1b[2J\n", "do"),
        Fact("other", "warn", "y"),
        Fact("z", "ok", ""),
    ]
    print_checks([{"name": one.name, "status": one.state, "found": one.found, "advice": one.advice} for one in facts])
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

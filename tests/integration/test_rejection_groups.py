"""Rejections by the thousand: groups of reasons, and the options that select some for list, requeue and discard."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from math import ceil
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.errors import EventConflict, EventWithdrawn, PoisonEvent, UnsupportedJob
from consumers.ops.rejections import Selection, count_rejections, rejection_groups, rejections
from producers.events import ARCHIVE_TYPE, SNAPSHOT_TYPE
from tests.controllers import cli
from tests.deliveries import history_queue
from tests.rejections import NOON, reject_conflicts, store_rejections

pytestmark = pytest.mark.usefixtures("database_url")


def _withdrawn(by: str, at: str) -> str:
    return str(EventWithdrawn(uuid4(), f"withdrawn by {by} at {at}: wrong balance", own=False))


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (
            str(EventConflict(uuid4(), "portfolio_history", 17)),
            str(EventConflict(uuid4(), "portfolio_history", 4)),
            "event … is stored already as row … of portfolio_history, with other content",
        ),
        (
            "data.signals.0.prices.yes: must be finite and within ±1.8e308",
            "data.signals.417.prices.yes: must be finite and within ±1.8e308",
            "data.signals.….prices.yes: must be finite and within ±…",
        ),
        (
            "Invalid JSON: expected value at line 1 column 33",
            "Invalid JSON: expected value at line 1 column 9041",
            "Invalid JSON: expected value at line … column …",
        ),
        (
            _withdrawn("ada", "2026-11-22 17:02:46Z"),
            _withdrawn("ada", "2026-11-23 08:11:09Z"),
            "withdrawn: event … with this content was withdrawn by ada at … …: wrong balance",
        ),
        (
            str(PoisonEvent(3, ValueError("could not convert string to float: 'no price'"))),
            str(PoisonEvent(3, ValueError("could not convert string to float: 'closed'"))),
            "poison event: … workers crashed or failed while processing it alone; last error: ValueError: could not"
            " convert string to float: …",
        ),
        (
            'PostgreSQL refused the values: invalid input syntax for type numeric: "a b" (SQLSTATE 22P02)',
            'PostgreSQL refused the values: invalid input syntax for type numeric: "" (SQLSTATE 22P02)',
            "PostgreSQL refused the values: invalid input syntax for type numeric: … (SQLSTATE …)",
        ),
    ],
    ids=["conflict", "path", "position", "withdrawn", "exception", "value in PostgreSQL's message"],
)
def test_reasons_that_differ_in_values_are_one_group(first: str, second: str, shown: str) -> None:
    """Each value is shown as …. `--reason` finds them by a part of this text, and by a part of the recorded text."""
    store_rejections(first, prefix="a-")
    store_rejections(second, prefix="b-")
    store_rejections("another reason", prefix="c-")
    assert [(one.count, one.reason) for one in rejection_groups()] == [(2, shown), (1, "another reason")]
    for part, count in (
        (shown, 2),
        (shown[4:40].upper(), 2),
        (first, 1),
        (first[-30:], 1 if first[-30:] != second[-30:] else 2),
    ):
        assert count_rejections(Selection(reason=part)) == count, part


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("data.balance: is missing", "data.trade_count: is missing"),
        ("data.balance: is missing", "data.balance: is missing; data.trade_count: is missing"),
        (
            'PostgreSQL refused the values: new row for relation "x" violates check constraint "a" (SQLSTATE 23514)',
            'PostgreSQL refused the values: new row for relation "x" violates check constraint "b" (SQLSTATE 23514)',
        ),
        (_withdrawn("ada", "2026-11-22 17:02:46Z"), _withdrawn("bob", "2026-11-22 17:02:46Z")),
        (str(UnsupportedJob("it calls a function other than our job functions: os.system")),
         str(UnsupportedJob("it calls a function other than our job functions: bot.run"))),
        ("event: must be one JSON string, not dict", "event: must be one JSON string, not list"),
    ],
    ids=["fields", "more fields", "constraints", "actors", "functions", "types"],
)  # fmt: skip
def test_reasons_that_differ_in_names_are_two_groups(first: str, second: str) -> None:
    store_rejections(first, prefix="a-")
    store_rejections(second, prefix="b-")
    assert sorted(one.reason for one in rejection_groups()) == sorted([first, second])


def test_a_group_has_its_kind_source_times_and_a_job() -> None:
    """The reason with the most events comes first, in it the source with the most. An equal text is shown as it is."""
    reason = "data.balance: must be a decimal string with at most 12 integer digits"
    store_rejections(reason, 2, prefix="a-", source="bot/1")
    store_rejections(reason, 3, prefix="b-", source="bot/2", at=NOON + timedelta(hours=1))
    store_rejections("archived # times", 4, prefix="c-", source=None, event=f'{{"type":"{ARCHIVE_TYPE}"}}')
    store_rejections(reason, 1, prefix="d-", event="not JSON")

    minute = timedelta(minutes=1)
    assert [tuple(vars(one).values()) for one in rejection_groups()] == [
        (3, "snapshot", reason, "bot/2", NOON + 61 * minute, NOON + 63 * minute, "b-1"),
        (2, "snapshot", reason, "bot/1", NOON + minute, NOON + 2 * minute, "a-1"),
        (4, "archive", "archived … times", None, NOON + minute, NOON + 4 * minute, "c-1"),
        (1, None, reason, "bot/1", NOON + minute, NOON + minute, "d-1"),
    ]


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (f'{{"specversion":"1.0","type":"{SNAPSHOT_TYPE}","data":{{"bal', "snapshot"),
        (f'{{\n  "a": [1, null],\n  "type": "{ARCHIVE_TYPE}"\n}}', "archive"),
        (f'{{"a":"\\"type\\":\\"{SNAPSHOT_TYPE}\\",","type":"{ARCHIVE_TYPE}"}}', "archive"),
        (f'{{"a":"}}{{","type":"{ARCHIVE_TYPE}"}}', "archive"),
        (f'{{"data":{{"type":"{SNAPSHOT_TYPE}"}},"type":"x"}}', None),
        (f'{{"a":"{SNAPSHOT_TYPE}","b":"type"}}', None),
        (f'["type","{SNAPSHOT_TYPE}"]', None),
        (f'{{"a":"{"x" * 9000}","type":"{SNAPSHOT_TYPE}"}}', None),
        (f'{{"type":"{SNAPSHOT_TYPE}","data":"{"é" * 9000}"}}', "snapshot"),
        (f'{{"type":"{SNAPSHOT_TYPE}2"}}', None),
        (f'{{"type":"{SNAPSHOT_TYPE.replace(".", "x")}"}}', None),
        ("[" * 200_000, None),
        ('{"a":' * 200_000, None),
        ('{"a":1,' * 200_000, None),
        ("", None),
    ],
)
def test_kind_is_read_by_the_database(event: str, kind: str | None) -> None:
    store_rejections("why", event=event)
    assert [one.kind for one in rejections()] == [kind]
    assert count_rejections(Selection(kind=kind or "-")) == 1
    assert count_rejections(Selection(kind="snapshot" if kind == "archive" else "archive")) == 0


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("bot", ["bot/4e1f", "bot/77aa"]),
        ("bot/4e1f", ["bot/4e1f"]),
        ("bot/4", ["bot/4e1f"]),
        ("bot-2", ["bot-2/4e1f"]),
        ("bot-", []),
        ("bo", []),
        ("Bot", []),
        ("bot/%", []),
        ("import", ["import/a.json/1"]),
        ("import/a", ["import/a.json/1"]),
        ("direct", ["direct"]),
        ("-", [None]),
    ],
)
def test_a_source_is_selected_by_its_name_or_its_beginning(source: str, found: list[str | None]) -> None:
    """The name is the part before a slash: `bot` is not `bot-2`."""
    for n, one in enumerate(("bot/4e1f", "bot/77aa", "bot-2/4e1f", "import/a.json/1", "direct", None)):
        store_rejections("why", prefix=f"{n}-", source=one)
    assert [one.source for one in rejections(Selection(source=source))] == found


_OPTIONS = [
    (("--reason", "balance"), ["a-1", "a-2", "a-3"]),
    (("--reason", "REASON …"), ["b-1", "b-2"]),
    (("--reason", "reason 2"), ["b-2"]),
    (("--source", "bot"), ["a-1", "a-2", "a-3"]),
    (("--kind", "archive"), ["b-1", "b-2"]),
    (("--kind", "-"), ["c-1"]),
    (("--since", "2026-11-29T13:02Z"), ["b-2", "c-1"]),
    (("--until", "2026-11-29T12:03Z"), ["a-1", "a-2"]),
    (("--limit", "2"), ["a-1", "a-2"]),
    (("--since", "2026-11-29T12:02Z", "--source", "bot", "--limit", "1"), ["a-2"]),
    (("--source", "nobody"), []),
]  # fmt: skip


def _three_groups() -> None:
    store_rejections("data.balance: is missing", 3, prefix="a-", source="bot/1")
    archive = {"source": "import/x/1", "event": f'{{"type":"{ARCHIVE_TYPE}"}}'}
    store_rejections("reason # of two", 2, prefix="b-", at=NOON + timedelta(hours=1), **archive)
    store_rejections("neither", prefix="c-", source=None, event="{}", at=NOON + timedelta(hours=2))


@pytest.mark.parametrize(("options", "jobs"), _OPTIONS)
def test_options_select_the_same_for_list_and_discard(redis: Redis, options: tuple[str, ...], jobs: list[str]) -> None:
    """--dry-run says how many, and changes nothing."""
    _three_groups()
    each = cli("failed", "list", "--each", "--json", *options)
    groups = cli("failed", "list", "--json", *options)
    planned = cli("failed", "requeue", "--dry-run", *options)
    assert [one["job_id"] for one in json.loads(each.stdout)] == jobs
    assert sum(one["count"] for one in json.loads(groups.stdout)) == len(jobs)
    assert (each.exit_code, groups.exit_code) == ((1, 1) if jobs else (0, 0))
    events = "1 event" if len(jobs) == 1 else f"{len(jobs)} events"
    assert planned.stdout.endswith(f"At most {events} would be requeued; nothing was changed.\n")
    assert cli("failed", "discard", "--dry-run", *options).exit_code == 0
    assert count_rejections() == 6
    done = cli("failed", "discard", "--because", "x", *options)
    assert (done.stdout, done.exit_code) == (f"{len(jobs)} discarded\n", 0)
    with get_db() as db:
        discarded = db.scalars(text("SELECT job_id FROM event_outcomes WHERE outcome = 'discarded' ORDER BY 1")).all()
    assert discarded == jobs


def test_options_select_the_same_for_requeue(redis: Redis) -> None:
    """Oldest first, at the end of the queue."""
    jobs = reject_conflicts(redis, 4)
    with get_db() as db:
        db.execute(text("UPDATE event_outcomes SET source = 'bot/2' WHERE job_id = :job"), {"job": jobs[1]})
    assert cli("failed", "requeue", "--source", "bot/1", "--limit", "2").stdout == "2 requeued\n"
    assert history_queue(redis).get_job_ids() == [jobs[0], jobs[2]]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("requeue",), "give a job id or event id, select some with --reason, --source, --kind, --since, --until or"),
        (("discard", "--because", "x"), "or all with --all"),
        (("requeue", "job-1", "--kind", "archive"), "give either a job id or event id, or options that select events"),
        (("requeue", "job-1", "--limit", "1"), "give either a job id or event id, or options that select events"),
        (("discard", "job-1", "--because", " "), "--because: say why the events may be discarded"),
        (("discard", "job-1"), "--because: say why the events may be discarded"),
        (("requeue", "--all", "--kind", "archive"), "--all: cannot be used with options that select events"),
        (("discard", "--all", "--limit", "1", "--dry-run"), "--all: cannot be used with options that select events"),
        (("list", "--kind", "sheep"), "must be one of snapshot, archive, or - for an unknown kind"),
        (("list", "--reason", " "), "--reason: must not be empty"),
        (("list", "--source", ""), "--source: must not be empty"),
        (("list", "--since", "7"), "7 is not a time: write for example 2026-11-22T17:00, "),
        (("list", "--limit", "0"), "must be a whole number from 1"),
        (("list", "--reason", "\udcff"), "--reason: must be UTF-8"),
        (("list", "--until", "9999-12-31T23:59:59-12:00"), "is before the year 1 or after 9999 in UTC"),
        (("discard", "--all", "--since", "0001-01-01T00:00+14:00"), "is before the year 1 or after 9999 in UTC"),
    ],
)
def test_a_wrong_selection_is_wrong_usage(redis: Redis, arguments: tuple[str, ...], error: str) -> None:
    store_rejections("why")
    run = cli("failed", *arguments)
    assert (run.exit_code, count_rejections()) == (2, 1)
    assert error in " ".join(run.stderr.replace("│", " ").split())


def test_a_name_without_a_rejection_is_an_error(redis: Redis) -> None:
    for command in (("requeue", "x"), ("requeue", "x", "--dry-run"), ("discard", "x", "--because", "y")):
        run = cli("failed", *command)
        assert (run.exit_code, str(run.exception)) == (1, "no rejection has the job id or event id x")


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Etc/GMT+12", "Asia/Kolkata"])
def test_relative_times_are_in_the_zone_of_the_settings(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    """`yesterday` lasts from midnight to midnight there. Hours are counted from now."""
    monkeypatch.setenv("HISTORY_TIMEZONE", zone)
    midnight = datetime.now(ZoneInfo(zone)).replace(hour=0, minute=0, second=0, microsecond=0)
    before, after = timedelta(minutes=-2), timedelta(0)  # the rejection is a minute later
    for days in (1, 0):
        for minute in (before, after):
            store_rejections("why", prefix=f"{days} {minute.days} ", at=midnight - timedelta(days=days) + minute)

    def listed(*options: str) -> list[str]:
        return [one["job_id"] for one in json.loads(cli("failed", "list", "--each", "--json", *options).stdout)]

    assert listed("--since", "yesterday", "--until", "today") == ["1 0 1", "0 -1 1"]
    assert listed("--since", "today") == ["0 0 1"]
    hours = ceil((datetime.now(UTC) - midnight) / timedelta(hours=1)) + 1
    assert listed("--since", f"{hours}h") == ["0 -1 1", "0 0 1"]

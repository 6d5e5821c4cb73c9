"""Text from events is shown literally: it sets no style and cannot control the terminal."""

from __future__ import annotations

import json
import sys
from datetime import timedelta, timezone
from functools import partial
from io import StringIO
from typing import Any

import pytest

from consumers.terminal import (
    print_any_character,
    print_archives,
    print_audit,
    print_checks,
    print_compared,
    print_comparison,
    print_import_statistics,
    print_json,
    print_rejection_groups,
    print_rejections,
    print_text,
    print_values,
)
from tests.factories import INSTANT

HOSTILE = "[/x] [range 1-2] [red]r[/red] :warning: \x1b[2J\x9b\n"
SHOWN = "[/x] [range 1-2] [red]r[/red] :warning: �[2J��"

_REJECTION = {"job_id": HOSTILE, "kind": None, "event_id": None, "created_at": INSTANT, "reason": HOSTILE}
_GROUP = {"count": 1, "kind": None, "source": HOSTILE, "first_at": INSTANT, "last_at": INSTANT} | _REJECTION
_ARCHIVE = {"id": 1, "portfolio_id": 1, "archived_at": INSTANT, "archive_month": "2026-11", "signals_count": 1}
_SIGNAL = {"action": "[/x]", "market_question": "Will [/b] win? [range 1-2] \x1b[2J"}
_COUNTS = ("stored", "duplicate", "rejected", "discarded", "withdrawn", "under_way", "last")
_SOURCE: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
_SOURCE |= {
    "since": None,
    "proven_from": 1,
    "missing": [],
    "mismatched": [],
    "shared": [],
    "copied": False,
    "tail_known": True,
    "host": None,
    "last_at": INSTANT,
}
_DIFFERENCE = {"first": 1, "last": 1, "problem": HOSTILE}
_CONTENT = {"checked": 1, "differing": 1, "differences": [_DIFFERENCE]}


@pytest.mark.parametrize(
    ("show", "what"),
    [
        (partial(print_rejections, otherwise=""), [_REJECTION]),
        (partial(print_rejection_groups, otherwise=""), [_GROUP]),
        (print_audit, [_SOURCE | {"source": HOSTILE}]),
        (partial(print_comparison, HOSTILE, with_what=HOSTILE), _CONTENT),
        (print_compared, [{"name": HOSTILE, "read": 1, "equal": 1, "differences": 0}]),
        (print_checks, [{"status": "ok", "name": HOSTILE, "found": HOSTILE, "advice": HOSTILE}]),
        (print_values, {"reason": HOSTILE}),
    ],
)
def test_tables_show_text_literally(show: Any, what: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are not styles, colons are not emoji, and each control character is replaced by �."""
    show(what)
    out = capsys.readouterr().out
    assert SHOWN in out
    assert not {"\x1b", "\x9b"} & set(out)


def test_market_question_is_shown_literally(capsys: pytest.CaptureFixture[str]) -> None:
    print_archives([_ARCHIVE | {"signals_data": [_SIGNAL]}])
    assert "[/x] Will [/b] win? [range 1-2] �[2J" in capsys.readouterr().out


def test_letters_of_all_languages_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """No-break spaces and joiners are kept too; the character that reverses the direction of text is replaced."""
    print_values({"reason": "10\u00a0000 👩\u200d💻 نمی\u200cشود \u202e"})
    assert "10\u00a0000 👩\u200d💻 نمی\u200cشود �" in capsys.readouterr().out


def test_json_output_keeps_its_value_and_controls_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Characters that JSON does not escape are escaped too: DEL, one-character CSI, lone surrogates, tags."""
    value = {"reason": "\x1b[2J \x7f \x9b \ud800 \u202e \U000e0001 ä 🌉"}
    print_json(value)
    out = capsys.readouterr().out
    assert json.loads(out) == value
    assert "ä 🌉" in out
    assert all(character.isprintable() for character in out.replace("\n", ""))


def test_event_text_is_printed_completely_and_controls_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks are kept, and JSON keeps its value."""
    print_text('{"type":\n\t"[/x] \x9b"} \x1b[2J')
    assert capsys.readouterr().out == '{"type":\n\t"[/x] \\u009b"} \\u001b[2J\n'


def test_a_time_that_ends_in_z_is_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    """In any offset that the database returned."""
    local = INSTANT.astimezone(timezone(timedelta(hours=9)))
    print_archives([_ARCHIVE | {"archived_at": local, "signals_data": [{}]}])
    print_rejections([_REJECTION | {"created_at": local}], "")
    print_audit([_SOURCE | {"source": "a", "since": local}])
    assert capsys.readouterr().out.count("2026-11-22 17:02:46Z") == 4


def test_the_command_in_the_damage_of_a_file_is_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A column of the table would break it."""
    damage = "portfolio_history.json: is CSV. Convert it: python3 " + "x " * 200
    counts = dict.fromkeys(("read", "stored", "already_there", "rejected"), 0)
    print_import_statistics([{"name": "a", "damage": damage, "notes": {}, **counts}])
    assert damage.rstrip() in capsys.readouterr().out


def test_a_source_that_copies_used_is_named_with_up_to_five_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """Each of these numbers has several events."""
    copied = _SOURCE | {"copied": True}
    print_audit(
        [
            copied | {"source": "bot/a", "shared": [*range(1, 7)]},
            copied | {"source": "bot/b", "shared": [8, 9]},
            copied | {"source": "bot/c"},
            _SOURCE | {"source": "bot/d"},
        ]
    )
    advice = " To find gaps in it, run audit on the host of each copy."
    lines = [line for line in capsys.readouterr().out.splitlines() if "copies" in line]
    assert lines == [
        f"bot/a was used by copies of one outbox. Numbers with several events: 1, 2, 3, 4, 5 and more.{advice}",
        f"bot/b was used by copies of one outbox. Numbers with several events: 8, 9.{advice}",
        f"bot/c was used by copies of one outbox.{advice}",
    ]


def test_a_comparison_shows_ten_differences_and_names_the_option_for_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    differences = [_DIFFERENCE | {"first": number, "last": number} for number in range(1, 12)]
    for count, more in ((10, []), (11, ["  --json shows the first 11."])):
        print_comparison("a", {"checked": 20, "differing": count, "differences": differences[:count]}, "the outbox")
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"a: 20 events compared with the outbox, {count} differ:"
        assert lines[1:] == [*(f"  number {number}: {SHOWN}" for number in range(1, 11)), *more]


def test_a_program_may_replace_standard_output_by_another_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """As notebooks do. It takes any character."""
    monkeypatch.setattr(sys, "stdout", replaced := StringIO())
    print_any_character()
    sys.stdout.write("Zürich 😀")
    assert replaced.getvalue() == "Zürich 😀"


@pytest.mark.parametrize("columns", [80, 120])
def test_rejections_fit_a_window_and_their_reasons_are_complete(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long word of a reason is wrapped; a source is cut to what `--source` needs."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    job, event = "a3d0b793687e439b8cfa30c1ac6e721c-1-cb1c19f888a60c3e", "f4187212-a240-5ba7-b147-dd5ea2e5cc73"
    reason = f"event {event} is stored already as row 17 of portfolio_history, with other content"
    print_rejections([_REJECTION | {"job_id": job, "kind": "snapshot", "event_id": event, "reason": reason}], "")
    each = capsys.readouterr().out
    print_rejection_groups([_GROUP | {"kind": "snapshot", "source": f"bot/{job[:32]}", "reason": reason}], "")
    groups = capsys.readouterr().out
    for out in (each, groups):
        assert max(map(len, out.splitlines())) <= columns
        assert "…" not in out
    assert job in each
    assert "bot/a3d0b793" in groups
    assert "bot/a3d0b7936" not in groups

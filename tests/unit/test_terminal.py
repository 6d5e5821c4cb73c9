"""What others wrote is shown letter by letter: it is no style, and nothing that steers the terminal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from consumers.terminal import (
    print_archives,
    print_audit,
    print_checks,
    print_compared,
    print_facts,
    print_json,
    print_rejections,
    print_text,
)
from tests.factories import INSTANT

HOSTILE = "[/x] [range 1-2] [red]r[/red] :warning: \x1b[2J\x9b\n"
SHOWN = "[/x] [range 1-2] [red]r[/red] :warning: �[2J��"

_REJECTION = {"job_id": HOSTILE, "kind": None, "event_id": None, "created_at": INSTANT, "reason": HOSTILE}
_ARCHIVE = {"id": 1, "portfolio_id": 1, "archived_at": INSTANT, "archive_month": "2026-11", "signals_count": 1}
_SIGNAL = {"action": "[/x]", "market_question": "Will [/b] win? [range 1-2] \x1b[2J"}
_SOURCE: dict[str, Any] = dict.fromkeys(("stored", "duplicate", "rejected", "discarded", "under_way", "last"), 0)
_SOURCE |= {
    "since": None,
    "proven_from": 1,
    "missing": [],
    "mismatched": [],
    "shared": [],
    "copied": False,
    "tail_known": True,
}


@pytest.mark.parametrize(
    ("show", "what"),
    [
        (print_rejections, [_REJECTION]),
        (print_audit, [_SOURCE | {"source": HOSTILE}]),
        (print_compared, [{"name": HOSTILE, "read": 1, "equal": 1, "differences": 0}]),
        (print_checks, [{"status": "ok", "name": HOSTILE, "found": HOSTILE, "advice": HOSTILE}]),
        (print_facts, {"reason": HOSTILE}),
    ],
)
def test_a_table_shows_what_others_wrote_as_it_is(show: Any, what: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets close no style and begin none, colons name no picture, and a mark stands for each control."""
    show(what)
    out = capsys.readouterr().out
    assert SHOWN in out
    assert not {"\x1b", "\x9b"} & set(out)


def test_the_question_of_a_market_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_archives([_ARCHIVE | {"signals_data": [_SIGNAL]}])
    assert "[/x] Will [/b] win? [range 1-2] �[2J" in capsys.readouterr().out


def test_letters_of_any_language_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Spaces that break no line and what joins letters and pictures steer nothing; what turns the line around does."""
    print_facts({"reason": "10\u00a0000 👩\u200d💻 نمی\u200cشود \u202e"})
    assert "10\u00a0000 👩\u200d💻 نمی\u200cشود �" in capsys.readouterr().out


def test_json_says_the_same_and_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Also what JSON itself would leave as it is: DEL, CSI in one character, lone surrogates, pictures of two."""
    said = {"reason": "\x1b[2J \x7f \x9b \ud800 \u202e \U000e0001 ä 🌉"}
    print_json(said)
    out = capsys.readouterr().out
    assert json.loads(out) == said
    assert "ä 🌉" in out
    assert all(character.isprintable() for character in out.replace("\n", ""))


def test_an_events_text_is_shown_whole_and_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines stay lines, and what was JSON is the same JSON."""
    print_text('{"type":\n\t"[/x] \x9b"} \x1b[2J')
    assert capsys.readouterr().out == '{"type":\n\t"[/x] \\u009b"} \\u001b[2J\n'

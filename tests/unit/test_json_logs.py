"""JSON log lines."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any
from uuid import UUID

from producers.json_logs import JsonFormatter

_EVENT_ID = UUID("7c1f366e-c9c3-5876-873e-6a33c29b098d")


def _line(message: str, *arguments: object, exc_info: Any = None, **extra: object) -> str:
    record = logging.LogRecord("rq.worker.history", logging.ERROR, "x.py", 1, message, arguments, exc_info)
    record.created = 1795370566.101
    vars(record).update(extra)
    return JsonFormatter().format(record)


def test_a_line_has_the_known_fields_of_the_event() -> None:
    """It has no other attribute of the record."""
    line = json.loads(
        _line("rejected job %s", "j-1", event_id=_EVENT_ID, job_id="j-1", sequence=42, source=None, password="s3cret")
    )
    assert line.pop("process") > 0
    assert line == {
        "time": "2026-11-22T18:02:46.101+00:00",
        "level": "error",
        "logger": "rq.worker.history",
        "message": "rejected job j-1",
        "event_id": str(_EVENT_ID),
        "job_id": "j-1",
        "sequence": 42,
    }


def test_any_message_becomes_one_line_of_ascii() -> None:
    """Line breaks, terminal escapes and lone surrogates are escaped."""
    message = "a\nb\x1b[31m\ud800 ü"
    line = _line(message)
    assert (line.isascii(), "\n" in line, json.loads(line)["message"]) == (True, False, message)


def test_a_traceback_is_a_field() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        line = _line("failed", exc_info=sys.exc_info())
    assert json.loads(line)["exception"].splitlines()[-1] == "ValueError: why"
    assert "\n" not in line

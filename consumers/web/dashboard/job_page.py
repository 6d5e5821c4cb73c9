"""What the page of one job tells: what became of it and why, and its event field by field."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import simplejson

from consumers.web.dashboard.stored_calls import Call, call_of, event_of, title_of
from consumers.web.dashboard.stored_jobs import StoredJob

_ENVELOPE = ("type", "id", "source", "sequence", "time", "subject")
_MAX_TEXT = 64 * 1024  # characters of an event; an archive may have megabytes
_MAX_VALUE = 300

Facts = list[tuple[str, str]]

_one_at_a_time = threading.Lock()  # a large event takes hundreds of megabytes while it is looked at


def job_facts(job: StoredJob) -> dict[str, Any]:
    """Names and values as text, ready to be shown. `reason` and `traceback` only of a failed job."""
    with _one_at_a_time:
        call = call_of(job, whole=True)
        event = event_of(call)
        return {
            "id": job.id,
            "title": title_of(job, call, event),
            "status": job.text("status") or "unknown",
            "reason": job.reason,
            "traceback": job.error if job.error != job.reason else None,
            "job": _job(job, call),
            "event": _named(_ENVELOPE, event) if event else [],
            "data": _data(event.get("data")) if event else [],
            "text": _text(job, call, event),
        }


def _job(job: StoredJob, call: Call) -> Facts:
    told: list[tuple[str, str | None]] = [
        ("status", job.text("status")),
        ("queue", job.text("origin")),
        ("function", job.harm or call.function or call.harm),
        ("call", call.harm if call.function else None),
        ("row", job.return_value if job.text("status") == "finished" else None),
        ("created", job.text("created_at")),
        ("enqueued", job.text("enqueued_at")),
        ("started", job.text("started_at")),
        ("ended", job.text("ended_at")),
        ("worker", job.text("worker_name")),
    ]
    return [(name, value[:_MAX_VALUE]) for name, value in told if value]


def _data(data: Any) -> Facts:
    """Amounts, counts and times; of signals how many, they stand in the text."""
    if not isinstance(data, dict):
        return []
    signals = data.get("signals")
    facts = _named((name for name in data if name != "signals"), data)
    return [*facts, ("signals", f"{len(signals)}, below")] if isinstance(signals, list) else facts


def _named(names: Iterable[str], values: Mapping[str, Any]) -> Facts:
    return [(str(name)[:_MAX_VALUE], _value(values[name])) for name in names if name in values][:100]


def _value(value: Any) -> str:
    return (value if isinstance(value, str) else _json(value))[:_MAX_VALUE]


def _text(job: StoredJob, call: Call, event: dict[str, Any] | None) -> str:
    """The whole event, a line a field; of what is no event the call's argument as it is."""
    if event is None:
        unread = call.argument if isinstance(call.argument, str) else _json(call.argument)
        text = unread if call.harm is None else job.text("data") or ""
    else:
        text = _json(event, indent=2)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}\n… and more"


def _json(value: Any, indent: int | None = None) -> str:
    """At most a little more than is shown: the rest is not even made."""
    encoder = simplejson.JSONEncoder(use_decimal=True, allow_nan=True, ensure_ascii=False, indent=indent)
    pieces, length = [], 0
    try:
        for piece in encoder.iterencode(value):
            pieces.append(piece)
            length += len(piece)
            if length > _MAX_TEXT:
                break
    except RecursionError:
        return "nested too deeply to be shown"
    return "".join(pieces)

"""What the page of one job tells: what became of it and why, and its event field by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import simplejson

from consumers.dashboard.stored_jobs import StoredJob

_ENVELOPE = ("type", "id", "source", "sequence", "time", "subject")
_MAX_TEXT = 64 * 1024  # characters of an event; an archive may have megabytes
_MAX_VALUE = 300

Facts = list[tuple[str, str]]


def job_facts(job: StoredJob) -> dict[str, Any]:
    """Names and values as text, ready to be shown. `reason` and `traceback` only of a failed job."""
    error, event = job.error, job.event
    return {
        "id": job.id,
        "title": job.description,
        "status": job.text("status") or "unknown",
        "reason": job.reason,
        "traceback": error if error and error != job.reason else None,
        "job": _job(job),
        "event": _named(_ENVELOPE, event) if event else [],
        "data": _data(event.get("data")) if event else [],
        "text": _text(job, event),
    }


def _job(job: StoredJob) -> Facts:
    call = job.call
    told: list[tuple[str, str | None]] = [
        ("status", job.text("status")),
        ("queue", job.text("origin")),
        ("function", call[0][:_MAX_VALUE] if call else job.harm or "its data cannot be read as JSON"),
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


def _text(job: StoredJob, event: dict[str, Any] | None) -> str:
    """The whole event, a line a field; of what is no event the call's argument as it is."""
    unread = str(job.call[1]) if job.call else job.text("data") or ""
    text = unread if event is None else _json(event, indent=2)
    left = len(text) - _MAX_TEXT
    return text if left <= 0 else f"{text[:_MAX_TEXT]}\n… and {left:,} characters more"


def _json(value: Any, indent: int | None = None) -> str:
    try:
        return simplejson.dumps(value, use_decimal=True, allow_nan=True, ensure_ascii=False, indent=indent)
    except RecursionError:
        return "nested too deeply to be shown"

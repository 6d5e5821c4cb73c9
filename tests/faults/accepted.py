"""Events that controllers have accepted: each process writes them into a file of its own, and the judge reads them.

Content is compared as text: the fields that an event stands for, with every number and every time in one form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from producers.events import Payload
from producers.history_producer import Receipt
from producers.redis_keys import job_id_of

_TIMES = ("timestamp", "archived_at")
_AMOUNTS = ("balance", "total_invested", "total_profit_loss", "total_value")
_SNAPSHOT = ("snapshot_date", "timestamp", *_AMOUNTS, "open_positions", "trade_count", "portfolio_id")
_ARCHIVE = ("archived_at", "signals", "portfolio_id")


@dataclass(frozen=True)
class Delivery:
    """One accepted event, and the job that carries it."""

    job_id: str
    source: str
    sequence: int
    event_id: str
    content: str


@dataclass(frozen=True)
class Answer:
    """The end that a receipt has told: the id of the row, or the reason of the rejection."""

    job_id: str
    row_id: int | None
    reason: str | None


@dataclass
class Accepted:
    """Deliveries whose `record` call has returned, and answers of their receipts."""

    deliveries: list[Delivery] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


def delivery_of_receipt(receipt: Receipt, payload: Payload) -> Delivery:
    one = receipt._accepted  # the nonce, which no public name has
    job_id = job_id_of(one.source_id, one.sequence, one.nonce)
    return Delivery(job_id, receipt.source, receipt.sequence, str(receipt.event_id), content_of(payload.model_dump()))


def content_of(data: Mapping[str, Any]) -> str:
    """Of an event's data in any of its forms: a payload's fields, the wire form, the columns of a row."""
    names = _SNAPSHOT if "balance" in data else _ARCHIVE
    return json.dumps({name: _one_form(name, data.get(name)) for name in names}, sort_keys=True)


def _one_form(name: str, value: Any) -> Any:
    if name in _TIMES:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return moment.astimezone(UTC).isoformat()
    if name in _AMOUNTS:
        return _one_number(Decimal(value))
    return _plain(value) if name == "signals" else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _one_number(Decimal(str(value)))
    return value


def _one_number(value: Decimal) -> str:
    return f"number {value.normalize():f}"


class AcceptedFile:
    """Appended to by one process, a line an event or an answer."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, line: Delivery | Answer) -> None:
        """In one call of the kernel: a death of the process leaves a whole line, or one without its end."""
        os.write(self._descriptor, json.dumps(asdict(line)).encode() + b"\n")


def read_accepted(path: Path) -> Accepted:
    """The whole lines of a file; nothing when it does not exist."""
    accepted = Accepted()
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        fields = json.loads(line)
        if "content" in fields:
            accepted.deliveries.append(Delivery(**fields))
        else:
            accepted.answers.append(Answer(**fields))
    return accepted

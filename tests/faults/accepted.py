"""Files of accepted events: each controller process writes one file, and `verdict` reads them all.

Contents are compared as text: the payload's fields, with numbers and times in a canonical form.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
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
    """Outcome that a receipt reported: the id of the row, or the reason of the rejection."""

    job_id: str
    row_id: int | None
    reason: str | None


@dataclass
class Accepted:
    """Deliveries whose `record` call has returned, and the answers of their receipts."""

    deliveries: list[Delivery] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


def delivery_of_receipt(receipt: Receipt, payload: Payload) -> Delivery:
    one = receipt._accepted  # no public name gives the nonce
    job_id = job_id_of(one.source_id, one.sequence, one.nonce)
    return Delivery(job_id, receipt.source, receipt.sequence, str(receipt.event_id), content_of(payload.model_dump()))


def content_of(data: Mapping[str, Any]) -> str:
    """Return the canonical text of event data, given as a payload's fields, the wire form or the columns of a row."""
    names = _SNAPSHOT if "balance" in data else _ARCHIVE
    return json.dumps({name: _canonical(name, data.get(name)) for name in names}, sort_keys=True)


def _canonical(name: str, value: Any) -> Any:
    if name in _TIMES:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return moment.astimezone(UTC).isoformat()
    if name in _AMOUNTS:
        return _canonical_number(Decimal(value))
    return _canonical_json(value) if name == "signals" else str(value)


def _canonical_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical_json(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical_json(member) for member in value]
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _canonical_number(Decimal(str(value)))
    return value


def _canonical_number(value: Decimal) -> str:
    return f"number {value.normalize():f}"


class AcceptedFile:
    """File to which one process appends a line for each event and each answer."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, line: Delivery | Answer) -> None:
        """Append a line in one system call: if the process is killed, the line is whole or lacks its line end."""
        os.write(self._descriptor, json.dumps(asdict(line)).encode() + b"\n")


def read_accepted(path: Path) -> Accepted:
    """Read the whole lines of a file; the result is empty if the file does not exist."""
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


def accepted_by_controller(folder: Path) -> dict[str, Accepted]:
    """Return the accepted events of all files `<controller>.<run>.jsonl` in a folder, by controller."""
    found: defaultdict[str, Accepted] = defaultdict(Accepted)
    for file in sorted(folder.glob("*.jsonl")):
        one = read_accepted(file)
        found[file.name.split(".")[0]].deliveries.extend(one.deliveries)
        found[file.name.split(".")[0]].answers.extend(one.answers)
    return dict(found)

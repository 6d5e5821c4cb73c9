"""Log lines as JSON, one object a line, for log collectors.

    handler.setFormatter(producers.json_logs.JsonFormatter())

is all that a controller needs; the `trading-history` command does it with HISTORY_LOG=json.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

# On every line that concerns one event, as far as they are known there; `outcome` once it has one.
EVENT_FIELDS = ("event_id", "job_id", "source", "sequence", "outcome")


class JsonFormatter(logging.Formatter):
    """Each line has time (RFC 3339, UTC), level, logger, process, message, and the EVENT_FIELDS that are known.

    `exception` is a traceback. Everything beyond ASCII is escaped, so that any stream can take it.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        line |= {name: value for name in EVENT_FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)

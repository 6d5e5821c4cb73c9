"""JSON log lines for log collectors, one object per line.

In a controller: `handler.setFormatter(producers.json_logs.JsonFormatter())`. The command `trading-history` uses it if
HISTORY_LOG is `json`.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

# Added to each line about one event, as far as known; `outcome` is present once the event has one.
EVENT_FIELDS = ("event_id", "job_id", "source", "sequence", "outcome", "traceparent", "tracestate")


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object, in ASCII.

    The keys are time (RFC 3339, UTC), level, logger, process (the process id), message, the known EVENT_FIELDS, and
    exception (a traceback) if there is one.
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

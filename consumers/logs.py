"""Where log lines of our own processes go and what they look like: text, or JSON with HISTORY_LOG=json."""

from __future__ import annotations

import logging
from typing import Literal

from pydantic import Field

from producers.json_logs import JsonFormatter
from producers.settings import EnvironmentSettings

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LOGGERS_OF_RQ = ("rq.worker", "rq.job")


class LogSettings(EnvironmentSettings):
    log: Literal["text", "json"] = Field("text", alias="HISTORY_LOG")


def write_logs(level: int) -> None:
    """To stderr, from `level` on. Raises SettingsError."""
    logging.basicConfig(level=level, format=_TEXT)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    write_json_if_set()


def write_json_if_set() -> None:
    """Every handler of this process writes JSON if that is set; also in RQ's own command. Raises SettingsError."""
    if LogSettings.from_environment().log != "json":
        return
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(level=logging.INFO)
    for handler in root.handlers:
        handler.setFormatter(JsonFormatter())
    for name in _LOGGERS_OF_RQ:  # RQ's command has given them handlers of its own, for text
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True

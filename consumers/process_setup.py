"""Set-up of a long-running process: its log lines (text, or JSON with HISTORY_LOG=json) and its stop signals."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable
from types import FrameType

from consumers.settings import LogSettings
from producers.json_logs import JsonFormatter

TESTED_RQ = ("3.0",)  # beginnings of versions
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LOGGERS_OF_RQ = ("rq.worker", "rq.job")


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


def on_stop_signals(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]) -> None:
    """Have `handler` called for these signals, except for those that whoever started this process has it ignore.

    So does `nohup` with SIGHUP, and a shell with SIGINT for what a script starts in the background.
    """
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)

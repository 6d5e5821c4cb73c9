"""Set-up of a long-running process: its log lines (text, or JSON with HISTORY_LOG=json) and its stop signals."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable
from types import FrameType
from typing import NoReturn

from consumers.settings import LogSettings
from producers.json_logs import JsonFormatter

TESTED_RQ = ("3.0",)  # first parts of version numbers
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LOGGERS_OF_RQ = ("rq.worker", "rq.job")

_exit_signals: list[int] = []  # received by `exit_on_signal`, whose SystemExit may have been lost


def write_logs(level: int) -> None:
    """Write log lines of `level` and above to stderr, as HISTORY_LOG says. Raises SettingsError."""
    logging.basicConfig(level=level, format=_TEXT)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # If this logger has no level when RQ is imported, RQ sets it to INFO. Batches write to a logger below it.
    logging.getLogger("rq.worker").setLevel(level)
    write_json_if_set()


def write_json_if_set() -> None:
    """Make every log handler of this process write JSON if HISTORY_LOG=json, in RQ's own commands too.

    Raises:
        SettingsError: HISTORY_LOG has another value than text and json.
    """
    if LogSettings.from_environment().log != "json":
        return
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(level=logging.INFO)
    for handler in root.handlers:
        handler.setFormatter(JsonFormatter())
    for name in _LOGGERS_OF_RQ:  # RQ's commands give them their own handlers, which write text
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def on_stop_signals(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]) -> None:
    """Call `handler` on these signals, except those that this process has ignored since its start.

    `nohup` makes its command ignore SIGHUP; a shell makes a script's background processes ignore SIGINT. The handler is
    called at once if `exit_on_signal` has received a signal, but its SystemExit was lost.
    """
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    while _exit_signals:
        handler(_exit_signals.pop(), None)


def exit_on_signal(number: int, _: FrameType | None) -> NoReturn:
    """End the process as Ctrl-C does, with exit status 128 + `number`: a handler for `on_stop_signals`.

    Python prints and ignores exceptions in callbacks of weak references, of which imports run many. Therefore, a
    command that runs until a signal calls `on_stop_signals` or `exit_if_signal_was_lost` after its imports.
    """
    _exit_signals.append(number)
    raise SystemExit(128 + number)


def exit_if_signal_was_lost() -> None:
    """End the process if it has received a signal that should have ended it."""
    if _exit_signals:
        raise SystemExit(128 + _exit_signals.pop())

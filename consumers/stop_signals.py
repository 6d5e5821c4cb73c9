"""Signals that end a command."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from types import FrameType


def handle(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]) -> None:
    """Have `handler` called for these signals, except for those that whoever started this process has it ignore.

    So does `nohup` with SIGHUP, and a shell with SIGINT for what a script starts in the background.
    """
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)

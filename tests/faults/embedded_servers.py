"""Signals for the embedded PostgreSQL and Valkey, and their next start."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Literal

import psutil

from consumers.embedded import servers

ServerName = Literal["redis", "postgres"]
_STOP_SECONDS = 30.0


class EmbeddedServers:
    """The embedded servers in the folder `home`, which an `embedded_stack` keeps running."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def pid(self, server: ServerName) -> int:
        file = self._home / ("valkey.pid" if server == "redis" else "postgres/postmaster.pid")
        return int(file.read_text().split("\n", 1)[0])

    def send(self, server: ServerName, number: signal.Signals) -> None:
        """Send a signal to a server. Do nothing if it does not run."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(self.pid(server), number)

    def stop(self, server: ServerName, number: signal.Signals) -> None:
        """Send a signal to a running server and wait until it has ended."""
        process = psutil.Process(self.pid(server))
        process.send_signal(number)
        deadline = time.monotonic() + _STOP_SECONDS
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{server} does not stop within {_STOP_SECONDS:.0f} s")
            time.sleep(0.05)

    def bring_back(self) -> None:
        """Start the servers that are not running. They keep running, because the stack uses them too."""
        with servers(self._home):
            pass

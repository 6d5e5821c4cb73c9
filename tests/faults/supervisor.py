"""Supervisor that starts programs, restarts those that have ended, and sends them signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class _Program:
    arguments: Callable[[], Sequence[str]]
    process: subprocess.Popen[bytes]
    restarts: bool


class Supervisor:
    """Supervisor of programs named `<kind> <number>`, each with a log of that name in the folder `logs`."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self.starts: Counter[str] = Counter()  # by kind
        self.failures: Counter[str] = Counter()  # by kind: exits with a status other than 0, without a signal
        self._logs, self._environment = logs, environment
        self._programs: dict[str, _Program] = {}

    def start(self, name: str, arguments: Callable[[], Sequence[str]], *, restarts: bool = True) -> None:
        """Start Python with the arguments that the function returns; it is called again at each restart."""
        with open(self._logs / f"{name.replace(' ', '-')}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments()],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **self._environment},
            )
        self._programs[name] = _Program(arguments, process, restarts)
        self.starts[name.split(maxsplit=1)[0]] += 1

    def names(self, *kinds: str) -> list[str]:
        """Return the names of the programs of these kinds that should be running."""
        return [name for name in self._programs if name.split()[0] in kinds]

    def is_running(self, name: str) -> bool:
        program = self._programs.get(name)
        return program is not None and program.process.poll() is None

    def restart_what_ended(self) -> None:
        for name, program in list(self._programs.items()):
            status = program.process.poll()
            if status is not None and program.restarts:
                self.failures[name.split(maxsplit=1)[0]] += status > 0
                self.start(name, program.arguments)

    def restart(self, name: str) -> None:
        """Kill a program and start it again at once."""
        arguments = self._programs[name].arguments
        self.kill(name)
        self.start(name, arguments)

    def kill(self, name: str) -> None:
        """End a program with SIGKILL for good. Do nothing if there is no such program."""
        program = self._programs.pop(name, None)
        if program is not None:
            program.process.kill()
            program.process.wait(30)

    def stop(self, name: str) -> None:
        """End a program with SIGTERM for good, and with SIGKILL if it runs 30 s later."""
        program = self._programs.pop(name)
        program.process.terminate()
        try:
            program.process.wait(30)
        except subprocess.TimeoutExpired:
            program.process.kill()
            program.process.wait(30)

    def pid(self, name: str) -> int | None:
        program = self._programs.get(name)
        return None if program is None else program.process.pid

    def send(self, name: str, number: signal.Signals) -> None:
        if name in self._programs:
            with contextlib.suppress(ProcessLookupError):
                self._programs[name].process.send_signal(number)

    def kill_all(self, *kinds: str) -> None:
        for name in self.names(*kinds):
            self.kill(name)

"""A server process that outlives the one that started it: known again by its pid file, awaited, stopped."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from consumers.errors import EmbeddedError

if TYPE_CHECKING:
    import psutil

START_SECONDS = 60  # includes crash recovery and the loading of Valkey's append-only file


class StillStarting(EmbeddedError):
    """Left running: stopping a recovery would make the next start begin it again."""


@dataclass(frozen=True)
class Server:
    name: str
    program: str
    pid_file: Path
    argument: Path  # on its command line and on that of no other process of this program
    log: Path
    stop_signals: Sequence[tuple[signal.Signals, int]]  # and the seconds that each one gets

    def process(self) -> psutil.Process | None:
        """The running server, or None. A pid that now belongs to another program is not it."""
        import psutil

        try:
            process = psutil.Process(int(self.pid_file.read_text().split("\n", 1)[0]))
            ours = process.name() == self.program and str(self.argument) in process.cmdline()
        except (FileNotFoundError, ValueError, psutil.Error):
            return None
        return process if ours else None

    def bring_up(self, answers: Callable[[], bool], launch: Callable[[], None]) -> None:
        """Start the server unless it runs, and wait: it may be recovering, or just started by a killed user."""
        deadline = time.monotonic() + START_SECONDS
        launched = False
        while not answers():
            if self.process() is None:
                if launched:
                    raise self.error("did not start")
                launch()
                launched = True
            elif time.monotonic() > deadline:
                what = f"does not answer after {START_SECONDS} seconds, is left running: try again"
                raise StillStarting(str(self.error(what)))
            else:
                time.sleep(0.05)

    def stop(self) -> None:
        """Return when the process is gone; not when its pid file is, which it removes before."""
        import psutil

        process = self.process()
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for number, seconds in self.stop_signals:
                process.send_signal(number)  # psutil refuses when the pid has been given to another process
                deadline = time.monotonic() + seconds
                while time.monotonic() < deadline:
                    if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                        return
                    time.sleep(0.01)
            raise self.error("does not stop")

    def error(self, what: str) -> EmbeddedError:
        return EmbeddedError(f"embedded {self.name} {what}; log {self.log}: {self.last_lines()}")

    def last_lines(self, count: int = 2) -> str:
        """The end of its log, or why that cannot be read."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 4096))
                return " | ".join(file.read().decode(errors="replace").splitlines()[-count:]) or "(empty)"
        except OSError as error:
            return f"({error.strerror})"


def run(
    program: Path | str,
    *arguments: object,
    account: pwd.struct_passwd | None = None,
    keep: IO[str] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end in a session of its own: Ctrl-C is for us.

    The environment is bare, because a server keeps it, with secrets and PG* variables. `keep` becomes the
    standard input: its lock is held until the program ends, also when we are killed before. The servers
    do not inherit it, since their launchers give them /dev/null.
    """
    return subprocess.run(
        [str(program), *map(str, arguments)],
        env={"LC_ALL": "C", "PATH": os.defpath, **environment},
        cwd="/",
        umask=0o077,
        start_new_session=True,
        stdin=keep or subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        user=account.pw_uid if account else None,
        group=account.pw_gid if account else None,
        extra_groups=[] if account else None,
    )


def checked(result: subprocess.CompletedProcess[str]) -> None:
    """Raises EmbeddedError, with the end of its output, for a program that has failed."""
    if result.returncode:
        output = " | ".join(result.stdout.splitlines()[-2:])
        raise EmbeddedError(f"{Path(result.args[0]).name} failed: {output}")

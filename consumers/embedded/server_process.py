"""Server processes that outlive the process that started them: find them by pid file, wait for them, stop them."""

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
    """The server does not answer yet. It is left running, because the next start would begin its recovery again."""


@dataclass(frozen=True)
class Server:
    """Program, files and stop signals of one server."""

    name: str
    program: str
    pid_file: Path
    argument: Path  # only its own command line has this argument
    log: Path
    stop_signals: Sequence[tuple[signal.Signals, int]]  # with the seconds to wait after each

    def process(self) -> psutil.Process | None:
        """Return the running server, or None, also if its pid now belongs to another program."""
        import psutil

        try:
            process = psutil.Process(int(self.pid_file.read_text().split("\n", 1)[0]))
            ours = process.name() == self.program and str(self.argument) in process.cmdline()
        except (FileNotFoundError, ValueError, psutil.Error):
            return None
        return process if ours else None

    def bring_up(self, answers: Callable[[], bool], launch: Callable[[], None]) -> None:
        """Start the server unless it runs, and wait until it answers.

        A server that runs may be recovering, or have been started by a process that was killed since.

        Raises:
            StillStarting: it runs but does not answer within 60 s.
            EmbeddedError: it does not start.
        """
        deadline = time.monotonic() + START_SECONDS
        launched = False
        while not answers():
            if self.process() is None:
                if launched:
                    raise self.error("did not start")
                launch()
                launched = True
            elif time.monotonic() > deadline:
                what = f"does not answer after {START_SECONDS} seconds and is left running: try again later"
                raise StillStarting(str(self.error(what)))
            else:
                time.sleep(0.05)

    def stop(self) -> None:
        """Stop the server and wait until its process has ended; it removes its pid file earlier than that."""
        import psutil

        process = self.process()
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for number, seconds in self.stop_signals:
                process.send_signal(number)  # psutil raises NoSuchProcess if the pid belongs to another process now
                deadline = time.monotonic() + seconds
                while time.monotonic() < deadline:
                    if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                        return
                    time.sleep(0.01)
            raise self.error("does not stop")

    def error(self, what: str) -> EmbeddedError:
        """Return an error that says "embedded <name> <what>", with the last lines of the server's log."""
        return EmbeddedError(f"embedded {self.name} {what}; log {self.log}: {self.last_lines()}")

    def last_lines(self, count: int = 2) -> str:
        """Return the last lines of the log, or why it cannot be read."""
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
    """Run a program to its end, in its own session, so that Ctrl-C does not reach it.

    Its environment is minimal, because a server would keep ours, with secrets and PG* variables. `keep` is its
    standard input: the lock on this file lasts until the program ends, even if we are killed before. The servers do
    not inherit it, since the programs that launch them give them /dev/null.
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
    """Raise EmbeddedError with the end of the output if a program failed."""
    if result.returncode:
        output = " | ".join(result.stdout.splitlines()[-2:])
        raise EmbeddedError(f"{Path(result.args[0]).name} failed: {output}")

"""Processes that the embedded servers and the supervision start and stop, with small programs in their place."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from consumers.embedded import child_processes, server_process, valkey
from consumers.embedded.installation import Installation
from consumers.embedded.server_process import Server, StillStarting, checked, run
from consumers.embedded.supervisor import Child
from consumers.errors import EmbeddedError


@contextmanager
def _running(
    folder: Path, *stop_signals: tuple[signal.Signals, int]
) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """Run `sleep 60` as a server that never answers."""
    with subprocess.Popen(["sleep", "60"]) as process:
        (folder / "pid").write_text(f"{process.pid}\n")
        try:
            yield Server("Sleep", "sleep", folder / "pid", Path("60"), folder / "log", stop_signals), process
        finally:
            process.kill()


def test_a_server_that_does_not_answer_in_time_is_left_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not started again, because it may be recovering."""
    monkeypatch.setattr(server_process, "START_SECONDS", 0.1)
    launched: list[bool] = []
    with _running(tmp_path) as (server, process):
        with pytest.raises(
            StillStarting, match=r"^embedded Sleep does not answer after 0\.1 seconds and is left running"
        ):
            server.bring_up(lambda: False, lambda: launched.append(True))
        assert (launched, process.poll()) == ([], None)


def test_the_next_signal_is_sent_if_a_server_does_not_end(tmp_path: Path) -> None:
    with _running(tmp_path, (signal.SIGCONT, 0), (signal.SIGKILL, 10)) as (server, process):
        server.stop()
        assert process.wait(0) == -signal.SIGKILL


def test_a_server_that_ignores_every_signal_is_an_error(tmp_path: Path) -> None:
    """The message says why there is nothing of its log."""
    with _running(tmp_path, (signal.SIGCONT, 0)) as (server, process):
        with pytest.raises(EmbeddedError) as caught:
            server.stop()
        assert process.poll() is None
    assert str(caught.value) == f"embedded Sleep does not stop; log {tmp_path / 'log'}: (No such file or directory)"


def test_the_error_of_a_failed_program_has_its_name_and_its_last_two_lines() -> None:
    with pytest.raises(EmbeddedError, match=r"^sh failed: two \| three$"):
        checked(run("/bin/sh", "-c", "echo one; echo two; echo three; exit 1"))


def test_the_error_of_a_valkey_that_ends_at_once_has_what_it_printed(tmp_path: Path) -> None:
    """For example that a shared library is missing, which is not in its log."""
    program = tmp_path / "valkey-server"
    program.write_text("#!/bin/sh\necho 'no library'\nexit 1\n")
    program.chmod(0o700)
    installation = Installation(tmp_path, "18", program, None)
    with (
        (tmp_path / "lock").open("w") as lock,
        pytest.raises(EmbeddedError, match="^embedded Valkey did not start: no library; log "),
    ):
        valkey.start(valkey.server(tmp_path), tmp_path, installation, lock)


def test_a_child_that_does_not_end_in_time_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_processes, "STOP_SECONDS", 0.1)
    stubborn = "trap '' TERM; echo ready; read line"
    with subprocess.Popen(["sh", "-c", stubborn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child_processes.stop(child)
        assert child.returncode == -signal.SIGKILL


def test_a_child_that_cannot_be_started_is_tried_again_after_a_pause(caplog: pytest.LogCaptureFixture) -> None:
    """For example while there are too many processes."""
    attempts: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        attempts.append(subprocess.Popen(["true"], stdin=subprocess.PIPE))
        if len(attempts) == 1:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return attempts[-1]

    child = Child("worker", start, is_restarted=False)
    with caplog.at_level(logging.INFO, "consumers.embedded.supervisor"):
        for _ in range(2):
            child.check()
        assert len(attempts) == 1
        until = time.monotonic() + 10
        while not child.done and time.monotonic() < until:
            child.check()
            time.sleep(0.02)
    for process in attempts:
        process.communicate()
    assert (len(attempts), child.done, child.failed) == (2, True, False)
    first, second = [record.getMessage() for record in caplog.records]
    how = "start failed: Resource temporarily unavailable (consecutive failure 1); next start in "
    assert first.startswith(f"worker ended unexpectedly, {how}")
    assert second == f"worker is process {attempts[1].pid}"

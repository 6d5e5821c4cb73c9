"""pytest in a forked child process, on a tree of the project that this process has not imported."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

_PROJECT = ("producers", "consumers", "tests")
_START_SECONDS = 60.0
_END_SECONDS = 30.0
_GIB = 2**30
_OPTIONS = ("-q", "-n0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")


@dataclass(frozen=True)
class ChildRun:
    """Result of a run of pytest in a child process.

    Attributes:
        exit_code: Of pytest; None if the child was killed because a test took too long.
        test: The first test that failed, or that took too long.
    """

    exit_code: int | None
    test: str | None


class _Reports:
    """Plugin that reports to the parent process which test begins and which one fails."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write("begins", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._write("fails", report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self._write("ends", "")

    def _write(self, what: str, test: str) -> None:
        os.write(self._pipe, json.dumps([what, test]).encode() + b"\n")


def run_pytest(
    tree: Path,
    files: Sequence[str],
    plugins: Sequence[object],
    most_seconds: Callable[[str], float],
    options: Sequence[str] = (),
) -> ChildRun:
    """Run pytest on test files of `tree` in a child process. Its output is in the file output.txt beside the tree.

    If a test takes longer than `most_seconds(test)`, the child is killed. All processes of its group end with it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_child(tree, [*_OPTIONS, *options, f"--basetemp={tree.parent / 't'}", *files], [_Reports(writing), *plugins])
    os.close(writing)
    try:
        is_in_time, test = _watch(reading, most_seconds)
    finally:
        os.close(reading)
        if not _ended(child, _END_SECONDS if is_in_time else 0):
            is_in_time = False
        _kill_group(child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return ChildRun(code if is_in_time else None, test)


def _watch(pipe: int, most_seconds: Callable[[str], float]) -> tuple[bool, str | None]:
    """Read the reports of the child. Returns whether it was in time, and the test that failed or was late."""
    deadline, test, failed, buffer = time.monotonic() + _START_SECONDS, None, None, b""
    while True:
        if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
            return False, test
        data = os.read(pipe, 65536)
        if not data:
            return True, failed
        *lines, buffer = (buffer + data).split(b"\n")
        for what, name in map(json.loads, lines):
            if what == "begins":
                test, deadline = name, time.monotonic() + most_seconds(name)
            elif what == "fails":
                failed = failed or name
            else:
                return True, failed


def _ended(child: int, seconds: float) -> bool:
    """Wait until the child has ended, which stays a zombie."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _kill_group(child: int) -> None:
    for kill, number in ((os.killpg, child), (os.kill, child)):
        with contextlib.suppress(ProcessLookupError):
            kill(number, signal.SIGKILL)


def _be_child(tree: Path, arguments: list[str], plugins: list[object]) -> None:
    code = 3
    try:
        os.setsid()
        # A mutant may fill memory or a file without end.
        resource.setrlimit(resource.RLIMIT_DATA, (4 * _GIB, 4 * _GIB))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_GIB, _GIB))
        _redirect(tree.parent / "output.txt")
        use_tree(tree)
        code = int(pytest.main(arguments, plugins=plugins))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def use_tree(tree: Path) -> None:
    """Make this process import the project from `tree`, as do its child processes."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _PROJECT]:
        del sys.modules[name]
    root = str(Path(__file__).parents[2])
    sys.path[:] = [str(tree), *(entry for entry in sys.path if os.path.abspath(entry) != root)]
    sys.path_importer_cache.clear()
    sys.dont_write_bytecode = False  # the next child imports the unchanged modules faster
    os.environ["PYTHONPATH"] = str(tree)
    os.chdir(tree)


def _redirect(file: Path) -> None:
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, number in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(target, number)

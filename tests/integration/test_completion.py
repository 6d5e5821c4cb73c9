"""Completion with Tab in bash, zsh and fish: an interactive shell with the script that `--show-completion` prints."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("trading-history")
_END = "a-prompt>"
_SECONDS = 40.0


class Shell:
    """An interactive shell on a terminal. What it shows is collected until it waits for input again."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal

    def show(self, text: str, until: str) -> str:
        """Type the text, and return what appears up to the first match of this pattern."""
        os.write(self._terminal, text.encode())
        shown, deadline = "", time.monotonic() + _SECONDS
        while not re.search(until, shown):
            assert time.monotonic() < deadline, f"no {until} in {shown!r}"
            if select.select([self._terminal], [], [], 0.2)[0]:
                shown += os.read(self._terminal, 65536).decode(errors="replace")
        return shown


@contextmanager
def _shell(folder: Path, *command: str) -> Iterator[Shell]:
    ours, theirs = pty.openpty()
    environment = {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", "HOME": str(folder), "TERM": "dumb", "PS1": _END}
    environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment, start_new_session=True
    )
    try:
        yield Shell(ours)
    finally:
        process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)


def _script(shell: str) -> str:
    """Return what `--show-completion` prints in this shell."""
    found = shutil.which(shell)
    assert found, f"no {shell}: apt-get install {shell}"
    run = subprocess.run(
        [found, "-c", f"{PROGRAM} --show-completion; true"], capture_output=True, text=True, check=True, timeout=60
    )
    return run.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "portfolio-file.json").touch()
    return tmp_path


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_completes_commands_options_values_and_files(shell: str, folder: Path) -> None:
    (folder / "script").write_text(_script(shell))
    start = {"bash": ["bash", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    setup = {"bash": "source ./script", "zsh": "autoload -Uz compinit && compinit -u && source ./script"}[shell]
    with _shell(folder, *start) as terminal:
        terminal.show(f"{setup}; echo is-$((40 + 2))\n", "is-42")
        for line, rest in (
            ("trading-history perf", "performance"),
            ("trading-history outbox sal", "salvage"),
            ("trading-history worker --proc", "--processes"),
            ("trading-history performance --measure eq", "equity"),
            ("trading-history snapshot portf", "portfolio-file.json"),
            ("trading-history relay --outbox portf", "portfolio-file.json"),
        ):
            incomplete = line.split()[-1]
            shown = terminal.show(f"{line}\t", re.escape(rest.removeprefix(incomplete)))
            assert rest.removeprefix(incomplete) in shown
            terminal.show("\x15echo is-$((40 + 3))\n", "is-43")  # Ctrl-U discards the line


def test_fish_completes_commands_options_values_and_files(folder: Path) -> None:
    """`complete -C` prints what Tab offers."""
    (folder / "script").write_text(_script("fish"))

    def offered(line: str) -> list[str]:
        run = subprocess.run(
            ["fish", "--no-config", "-c", f"source ./script; complete -C '{line}'"],
            capture_output=True, text=True, check=True, timeout=60, cwd=folder,
            env={**os.environ, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", "HOME": str(folder)},
        )  # fmt: skip
        return [one.partition("\t")[0] for one in run.stdout.splitlines()]

    assert offered("trading-history perf") == ["performance"]
    assert offered("trading-history outbox sal") == ["salvage"]
    assert offered("trading-history worker --proc") == ["--processes"]
    assert offered("trading-history performance --measure eq") == ["equity"]
    assert offered("trading-history snapshot portf") == ["portfolio-file.json"]
    assert offered("trading-history relay --outbox portf") == ["portfolio-file.json"]


@pytest.mark.parametrize("command", ["--install-completion", "--show-completion"])
def test_completion_needs_no_settings_and_starts_nothing(command: str, folder: Path) -> None:
    """It works before anything is set up."""
    environment = {**os.environ, "HOME": str(folder), "HISTORY_LOG": "wrong"}
    run = subprocess.run(
        ["bash", "-c", f"{PROGRAM} {command}; exit $?"],
        capture_output=True, text=True, check=False, timeout=60, env=environment, cwd=folder,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    assert (folder / ".bash_completions").exists() == (command == "--install-completion")


def test_hidden_options_are_not_offered(folder: Path) -> None:
    """They are for child processes."""
    environment = {**os.environ, "_TRADING_HISTORY_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    run = subprocess.run(
        [PROGRAM], capture_output=True, text=True, check=True, timeout=60,
        env=environment | {"COMP_WORDS": "trading-history --"},
    )  # fmt: skip
    assert run.stdout.split() == ["--debug", "--version", "--install-completion", "--show-completion", "--help"]

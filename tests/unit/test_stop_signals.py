"""A stop signal that arrives while Python runs a callback of a deleted object, which is common during imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Python prints and ignores an exception in such a callback.
_LOSE_A_SIGNAL = """
import os, signal, weakref
from consumers.process_setup import exit_if_signal_was_lost, exit_on_signal, on_stop_signals

class Module:
    pass

on_stop_signals([signal.SIGTERM], exit_on_signal)
module = Module()
reference = weakref.ref(module, lambda _: os.kill(os.getpid(), signal.SIGTERM))
del module
print("continues", flush=True)
"""


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("exit_if_signal_was_lost()", 128 + 15),
        ("from consumers.embedded.stack import stack\nwith stack(database=True):\n    print('servers run')", 128 + 15),
        ("on_stop_signals([signal.SIGTERM], lambda number, _: os._exit(number))", 15),
        ("on_stop_signals([signal.SIGTERM], lambda *_: None); exit_if_signal_was_lost()", 0),  # it was handled
    ],
)
def test_a_lost_stop_signal_ends_the_process_later(then: str, status: int) -> None:
    process = subprocess.run(
        [sys.executable, "-c", f"{_LOSE_A_SIGNAL}\n{then}"], capture_output=True, text=True, check=False
    )
    assert ("Exception ignored" in process.stderr, process.stdout) == (True, "continues\n")
    assert process.returncode == status


def test_a_stop_signal_ends_the_process_at_once() -> None:
    script = _LOSE_A_SIGNAL.partition("class Module")[0]
    script += "on_stop_signals([signal.SIGTERM], exit_on_signal)\nos.kill(os.getpid(), signal.SIGTERM)\nprint(1)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (128 + 15, "", "")

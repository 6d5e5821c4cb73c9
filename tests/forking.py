"""Forked child process that runs one function and never the rest of the test suite."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def in_child(function: Callable[[], object]) -> int:
    """Fork, run `function` in the child and wait for it.

    Returns:
        The child's exit code: 0, or 1 if the function raised; its traceback is printed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

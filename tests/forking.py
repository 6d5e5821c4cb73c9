"""A forked child that ends without continuing the test run."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def in_child(function: Callable[[], object]) -> int:
    """Run `function` in a forked child and return its exit code: 0, or 1 after a traceback if it raised."""
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

"""A forked child that cannot go on with the rest of the suite."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def in_child(function: Callable[[], object]) -> int:
    """Fork, run `function` in the child, wait; its exit code is 0, or 1 with a traceback when it raised."""
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

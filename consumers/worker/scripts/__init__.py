"""The worker's Lua scripts: one file each, with a header that names its KEYS, its ARGV and its reply.

A script is one atomic step: no other client sees a part of it, and if a worker dies, all of it or nothing is done.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from redis import Redis
from redis.commands.core import Script

_FOLDER = Path(__file__).parent


def load(redis: Redis, name: str) -> Script:
    """Return the script of that name, preceded by the functions of library.lua. Call it with `keys` and `args`."""
    return redis.register_script(_text("library") + _text(name))


@cache
def _text(name: str) -> str:
    return (_FOLDER / f"{name}.lua").read_text("utf-8")

"""The worker's Lua scripts: one file each, with a header that names its KEYS, its ARGV and its reply.

A script runs as one step: no other client sees half of it, and a worker that dies leaves all of it or nothing.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from redis import Redis
from redis.commands.core import Script

_FOLDER = Path(__file__).parent


def load(redis: Redis, name: str) -> Script:
    """Return the script of that name, ready to be called on `redis`; the functions of library.lua stand before it."""
    return redis.register_script(_text("library") + _text(name))


@cache
def _text(name: str) -> str:
    return (_FOLDER / f"{name}.lua").read_text("utf-8")

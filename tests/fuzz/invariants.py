"""The targets, and their broken invariants: the error, its signature, and a reduced input that causes it."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

TARGETS = {"decode": "event_texts", "import": "old_files", "api": "api_requests"}  # modules by name
_ROOT = Path(__file__).parents[2]
_REDUCING_SECONDS = 20.0


class BrokenInvariant(AssertionError):
    """The code returned, but what it returned breaks an invariant."""


class Target(Protocol):
    """Module of one target.

    `check` raises any exception for an input that breaks an invariant. With `store`, it also writes to the database.
    """

    def seeds(self) -> Iterable[bytes]: ...

    def check(self, data: bytes, *, store: bool) -> None: ...


def target_named(name: str) -> Target:
    target: Target = importlib.import_module(f"tests.fuzz.{TARGETS[name]}")
    return target


def require(condition: object, reason: str) -> None:
    """Raise BrokenInvariant with the reason unless `condition` is true."""
    if not condition:
        raise BrokenInvariant(reason)


def signature(error: BaseException) -> str:
    """Return the type of an exception and the innermost line of this project: equal for the same defect."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
    if isinstance(error, BrokenInvariant):
        frames = frames[:-1]  # that of `require`
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
    return f"{type(error).__name__} {place}"


def _is_ours(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(_ROOT) and ".venv" not in path.parts


def failure_of(check: Callable[[bytes], None], data: bytes) -> BaseException | None:
    """Return the exception that `check` raises for `data`, or None."""
    try:
        check(data)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    return None


def failures(inputs: Iterable[tuple[str, bytes]]) -> list[str]:
    """Check each input, given with the name of its target, also with the database. Return those that fail, and why."""
    found = []
    for name, data in inputs:
        error = failure_of(partial(target_named(name).check, store=True), data)
        found += [f"{name} {data[:300]!r}: {type(error).__name__}: {error}"] if error else []
    return found


def reduced(check: Callable[[bytes], None], data: bytes) -> bytes:
    """Return a part of `data` that fails with the same signature: pieces are left out as long as it does, for 20 s."""
    error = failure_of(check, data)
    if error is None:
        return data
    wanted, deadline = signature(error), time.monotonic() + _REDUCING_SECONDS
    size = len(data) // 2
    while size and time.monotonic() < deadline:
        at = 0
        while at < len(data) and time.monotonic() < deadline:
            shorter = data[:at] + data[at + size :]
            other = failure_of(check, shorter)
            if other is not None and signature(other) == wanted:
                data = shorter
            else:
                at += size
        size //= 2
    return data

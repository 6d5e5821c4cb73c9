"""Where a cycle's signals come from: the caller, an API, or the file that the trading system overwrites."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from producers.errors import SignalsUnreadable
from producers.events import MAX_EVENT_BYTES

URL_TIMEOUT_SECONDS = 5.0


def read_signals(given: Any, *, signals_url: str | None, signals_path: Path) -> list[Any]:
    """The signals of the first source that is given; an empty list when it has none.

    Raises:
        SignalsUnreadable: the source that was chosen holds no JSON array of signals.
    """
    if given is not None:
        return _array(given, "signals")
    if signals_url is not None:
        return _parse(_fetch(signals_url), "the answer of signals_url")
    try:
        content = signals_path.read_bytes()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:  # the latter for a path with a NUL character
        raise SignalsUnreadable(f"{signals_path}: {getattr(error, 'strerror', None) or error}") from error
    return _parse(content, str(signals_path))


def _fetch(url: str) -> bytes:
    import httpx  # only this path needs it, and it is slow to import

    deadline = time.monotonic() + URL_TIMEOUT_SECONDS
    try:
        with httpx.stream("GET", url, timeout=URL_TIMEOUT_SECONDS, follow_redirects=True) as response:
            response.raise_for_status()
            content = b""
            for chunk in response.iter_bytes():
                content += chunk
                # The library's limit is for each read; one that drips would hold the caller for ever.
                if time.monotonic() > deadline:
                    raise SignalsUnreadable(f"signals_url took longer than {URL_TIMEOUT_SECONDS:.0f} s")
                if len(content) > MAX_EVENT_BYTES:
                    raise SignalsUnreadable(f"the answer of signals_url is larger than {MAX_EVENT_BYTES // 2**20} MiB")
            return content
    except httpx.HTTPStatusError as error:
        raise SignalsUnreadable(f"signals_url answered {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        # Not the library's own message: it repeats the URL, which may hold a token.
        raise SignalsUnreadable(f"signals_url cannot be read: {type(error).__name__}") from None


def _parse(content: bytes, name: str) -> list[Any]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SignalsUnreadable(f"{name}: not UTF-8 at byte {error.start}") from None
    if not text.strip():
        return []
    try:
        # Decimal keeps every digit that a binary float would drop.
        document = json.loads(text, parse_float=Decimal)
    except json.JSONDecodeError as error:
        raise SignalsUnreadable(f"{name}: line {error.lineno} column {error.colno}: {error.msg}") from None
    except (RecursionError, ArithmeticError, ValueError):
        raise SignalsUnreadable(f"{name}: nested too deeply, or a number of too many digits") from None
    return _array(document, name)


def _array(document: Any, name: str) -> list[Any]:
    if isinstance(document, Mapping):
        if "signals" not in document:
            raise SignalsUnreadable(f"{name}: is an object without 'signals'")
        document, name = document["signals"], f"{name}: 'signals'"
    if not isinstance(document, list | tuple):
        raise SignalsUnreadable(f"{name}: must be a list of signals, not {type(document).__name__}")
    return list(document)

"""Where a cycle's signals come from: the caller, an API, or the file that the trading system overwrites."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from decimal import Decimal
from pathlib import Path
from typing import Any

from producers.errors import SignalsUnreadable
from producers.events import MAX_EVENT_BYTES
from producers.fields import type_name

URL_TIMEOUT_SECONDS = 5.0  # from the call to its answer, or to an error


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
    """The answer of `url`, within URL_TIMEOUT_SECONDS whatever the server does."""
    download = _Download(url)
    try:
        return download.content.result(URL_TIMEOUT_SECONDS)
    except TimeoutError:
        raise _too_slow() from None
    finally:
        download.abort()


class _Download:
    """One GET, in a thread of its own: `content` gets the answer, or SignalsUnreadable.

    The library limits each attempt to connect and each read, of which a server can cause any number, and not the
    look-up of a name. Nothing waits for the thread, not even the interpreter's exit.
    """

    def __init__(self, url: str) -> None:
        self.content: Future[bytes] = Future()
        self._url = url
        self._socket: socket.socket | None = None
        self._aborted = False
        try:
            threading.Thread(target=self._run, name="signals-url", daemon=True).start()
        except RuntimeError:  # at the interpreter's end
            raise SignalsUnreadable("signals_url cannot be read: no thread can start") from None

    def abort(self) -> None:
        """End the thread: at once if it reads or writes, else when its look-up or attempt to connect has ended."""
        self._aborted = True
        self._hang_up()

    def _run(self) -> None:
        try:
            self.content.set_result(self._read())
        except Exception as error:
            self.content.set_exception(error)

    def _read(self) -> bytes:
        import httpx  # only this path needs it, and it is slow to import

        content = bytearray()
        try:
            with (
                httpx.Client(timeout=URL_TIMEOUT_SECONDS, follow_redirects=True) as client,
                client.stream("GET", self._url, extensions={"trace": self._note_socket}) as response,
            ):
                response.raise_for_status()
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > MAX_EVENT_BYTES:
                        size = MAX_EVENT_BYTES // 2**20
                        raise SignalsUnreadable(f"the answer of signals_url is larger than {size} MiB")
                return bytes(content)
        except httpx.HTTPStatusError as error:
            raise SignalsUnreadable(f"signals_url answered {error.response.status_code}") from None
        except httpx.TimeoutException:
            raise _too_slow() from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            # Not the library's own message: it repeats the URL, which may hold a token.
            raise SignalsUnreadable(f"signals_url cannot be read: {type(error).__name__}") from None

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by the library at each step: notes the socket of each connection; redirects lead to several."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._aborted:
                self._hang_up()

    def _hang_up(self) -> None:
        """Shut the socket down without closing it: its file number might be given to another file at once."""
        with contextlib.suppress(OSError):  # closed already
            if self._socket is not None:
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # under TLS too, without its closing message


def _too_slow() -> SignalsUnreadable:
    return SignalsUnreadable(f"signals_url took longer than {URL_TIMEOUT_SECONDS:g} s")


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
        raise SignalsUnreadable(f"{name}: must be a list of signals, not {type_name(document)}")
    return list(document)

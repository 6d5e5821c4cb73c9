"""Sources of the signals of a trading cycle: the caller, a URL, or the file that the trading system overwrites."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from decimal import Decimal
from pathlib import Path
from typing import Any

from producers.errors import SignalsUnreadable
from producers.events import MAX_EVENT_BYTES
from producers.fields import type_name

URL_TIMEOUT_SECONDS = 5.0  # for the whole request: name lookup, connections, redirects and the response


def read_signals(given: Any, *, signals_url: str | None, signals_path: Path) -> list[Any]:
    """Return the signals of the first source that is given: `given`, `signals_url`, then `signals_path`.

    The list is empty if that source has no signals or the file does not exist.

    Raises:
        SignalsUnreadable: that source does not contain a JSON array of signals.
    """
    if given is not None:
        return _array(given, "signals")
    if signals_url is not None:
        return _parse(_fetch(signals_url), "the response of signals_url")
    try:
        content = signals_path.read_bytes()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL character
        raise SignalsUnreadable(f"{signals_path}: {getattr(error, 'strerror', None) or error}") from error
    return _parse(content, str(signals_path))


def _fetch(url: str) -> bytes:
    """Return the body of the response, or raise SignalsUnreadable, within URL_TIMEOUT_SECONDS."""
    download = _Download(url)
    try:
        return download.content.result(URL_TIMEOUT_SECONDS)
    except TimeoutError:
        raise _too_slow() from None
    finally:
        download.abort()


class _Download:
    """One GET request in a separate thread. `content` receives the response body, or SignalsUnreadable.

    A thread, because httpx limits each connection attempt and each read, not the whole request, and the name lookup
    not at all. Nothing waits for the thread, not even the interpreter's exit.
    """

    def __init__(self, url: str) -> None:
        self.content: Future[bytes] = Future()
        self._url = url
        self._socket: socket.socket | None = None
        self._aborted = False
        try:
            threading.Thread(target=self._run, name="signals-url", daemon=True).start()
        except RuntimeError:  # the interpreter is shutting down
            raise SignalsUnreadable("signals_url cannot be read: cannot start a thread") from None

    def abort(self) -> None:
        """End the thread: at once if it reads or writes, otherwise after its name lookup or connection attempt."""
        self._aborted = True
        self._shut_down_socket()

    def _run(self) -> None:
        try:
            self.content.set_result(self._read())
        except Exception as error:
            self.content.set_exception(error)

    def _read(self) -> bytes:
        import httpx  # here, because it is slow to import and only this function needs it

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
                        raise SignalsUnreadable(f"the response of signals_url is larger than {size} MiB")
                return bytes(content)
        except httpx.HTTPStatusError as error:
            raise SignalsUnreadable(f"signals_url returned HTTP status {error.response.status_code}") from None
        except httpx.TimeoutException:  # pragma: no cover - the caller's wait has the same limit and ends first
            raise _too_slow() from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError):
            raise SignalsUnreadable("signals_url is not a valid http:// or https:// URL") from None
        except httpx.HTTPError as error:
            # The library's message repeats the URL, which may contain a token, so it is left out.
            reason = _system_reason(error) or type(error).__name__
            raise SignalsUnreadable(f"signals_url cannot be read: {reason}") from None

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        """Remember the socket of the newest connection; redirects open several. httpx calls this at each step."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._aborted:
                self._shut_down_socket()

    def _shut_down_socket(self) -> None:
        """Shut the socket down without closing it: a closed descriptor's number could be reused at once."""
        with contextlib.suppress(OSError):  # it is closed already
            if self._socket is not None:
                # The plain socket's method, with TLS too: no close message is exchanged.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _system_reason(error: BaseException) -> str | None:
    """Return the system's reason, such as `Connection refused`, and the certificate's problem of a TLS connection."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return f"TLS: {getattr(cause, 'verify_message', None) or cause.reason}"
        if isinstance(cause, socket.gaierror):
            return "its host name is not known"
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror}; check its host and port"
        cause = cause.__cause__ or cause.__context__
    return None


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
        # A binary float would lose digits, a Decimal keeps all.
        document = json.loads(text, parse_float=Decimal)
    except json.JSONDecodeError as error:
        raise SignalsUnreadable(f"{name}: line {error.lineno} column {error.colno}: {error.msg}") from None
    except (RecursionError, ArithmeticError, ValueError):
        raise SignalsUnreadable(f"{name}: nested too deeply, or a number has too many digits") from None
    return _array(document, name)


def _array(document: Any, name: str) -> list[Any]:
    if isinstance(document, Mapping):
        if "signals" not in document:
            raise SignalsUnreadable(f"{name}: must be a list, or an object with the key 'signals'")
        document, name = document["signals"], f"{name}: 'signals'"
    if not isinstance(document, list | tuple):
        raise SignalsUnreadable(f"{name}: must be a list of signals, not {type_name(document)}")
    return list(document)

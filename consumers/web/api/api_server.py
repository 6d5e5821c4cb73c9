"""The API as a server of its own."""

from __future__ import annotations

import socket
import sys

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from consumers.settings import ApiSettings
from consumers.web.api import app
from consumers.web.listening import is_local, listen, url_of

_LEAVE_SECONDS = 5  # for answers in progress when the server is stopped
_IDLE_SECONDS = 30.0
_MAX_HEAD_BYTES = 64 * 1024
_HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedHead(HttpToolsProtocol):
    """A connection whose requests may have 64 KiB of headers; httptools takes any number, and keeps them in memory."""

    _awaiting_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._awaiting_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_HEAD_TOO_LARGE)
                self.transport.close()

    def on_message_begin(self) -> None:
        self._awaiting_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._awaiting_head = False
        super().on_headers_complete()


def _disconnect_idle_readers(listening: socket.socket) -> None:
    """Disconnect a client that reads nothing for half a minute: uvicorn would keep its answer in memory."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted connections inherit it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(_IDLE_SECONDS * 1000))


def serve(host: str, port: int) -> None:
    """Answer at `host` and `port` (0: any that is free) until a signal ends this process.

    Raises:
        SettingsError: a setting of the API is wrong.
        HistoryError: the address cannot be used.
    """
    settings = ApiSettings.from_environment()
    with listen(host, port) as listening:
        _disconnect_idle_readers(listening)
        if settings.token is None and not is_local(listening):
            print(f"Whoever reaches {host} can read everything: HISTORY_API_TOKEN is not set.", file=sys.stderr)
        config = uvicorn.Config(
            app,
            http=BoundedHead,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=_LEAVE_SECONDS,
        )
        print(f"{url_of(listening)} - Ctrl-C ends it.", flush=True)
        uvicorn.Server(config).run(sockets=[listening])

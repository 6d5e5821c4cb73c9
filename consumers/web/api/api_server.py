"""The API as a server process (`trading-history api`)."""

from __future__ import annotations

import logging
import socket
import sys
import threading

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from consumers.process_setup import exit_if_signal_was_lost
from consumers.settings import ApiSettings
from consumers.web.api import app, check_tables_now
from consumers.web.listening import is_local, url_of
from producers.errors import HistoryError

logger = logging.getLogger(__name__)

_LEAVE_SECONDS = 5  # to finish answers in progress when the server stops
_IDLE_SECONDS = 30.0
_MAX_HEAD_BYTES = 64 * 1024
_HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedHead(HttpToolsProtocol):
    """HTTP connection that limits request headers to 64 KiB. httptools sets no limit and keeps them in memory."""

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
    """Disconnect a client that reads nothing for 30 s: uvicorn would keep its answer in memory."""
    # Linux only; accepted connections inherit it.
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # pragma: no branch - the gate runs on Linux
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(_IDLE_SECONDS * 1000))


def _report_database() -> None:
    """Log in one line if the tables cannot be read, which a wrong DATABASE_URL shows only at the first request."""
    try:
        check_tables_now()
    except HistoryError as error:
        logger.error("%s. Until then, requests are answered with status 503.", error.with_advice())


def serve(listening: socket.socket) -> None:
    """Serve the API at a listening socket until SIGINT or SIGTERM.

    Raises:
        SettingsError: A setting of the API is wrong.
    """
    settings = ApiSettings.from_environment()
    _disconnect_idle_readers(listening)
    if settings.token is None and not is_local(listening):
        host = listening.getsockname()[0]
        print(
            f"HISTORY_API_TOKEN is not set: everybody who can connect to {host} can read the history.",
            file=sys.stderr,
        )
    config = uvicorn.Config(
        app,
        http=BoundedHead,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=_LEAVE_SECONDS,
    )
    print(f"{url_of(listening)} - stop with Ctrl-C", flush=True)
    threading.Thread(target=_report_database, name="database-check", daemon=True).start()
    exit_if_signal_was_lost()  # uvicorn installs its own handlers next
    uvicorn.Server(config).run(sockets=[listening])

"""A monitoring service on loopback that keeps each request that it gets and answers as a test needs it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

CHECK_ID = "5bf66975-d4c7-4bf5-bcc8-b8d8a82ea278"
"""In each URL, and nowhere else: it is a secret."""


class Got(NamedTuple):
    """One request: `POST /ping/…/fail`, its content type and its body."""

    line: str
    content_type: str | None
    body: str


@dataclass
class Service:
    """The service. `url` is that of its check.

    Each element of `answers` is for one request, the last one for all later requests. An answer is a status, a status
    with a body or a Location, `drips` (one byte of a header every 0.1 s), `drips body`, `broken body`, `no HTTP`, or
    `silent` (no answer).
    """

    answers: Sequence[Any] = (200,)
    got: list[Got] = field(default_factory=list)
    url: str = ""

    @property
    def lines(self) -> list[str]:
        """The requests, with ID in place of the check's id."""
        return [one.line.replace(CHECK_ID, "ID") for one in self.got]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, service: Service) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.service = service
        self.ended = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        service, body = self.server.service, self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        answer = service.answers[min(len(service.got), len(service.answers) - 1)]
        service.got.append(Got(f"{self.command} {self.path}", self.headers.get("Content-Type"), body))
        if answer == "silent":
            self.server.ended.wait(60)
        elif answer == "drips":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self._drip(b"X-Slow: " + b"x" * 1000)
        elif answer == "drips body":
            self._send(200, b"", {"Content-Length": "1000"})
            self._drip(b"x" * 1000)
        elif answer == "broken body":
            self._send(200, b"no length of a chunk\r\n", {"Transfer-Encoding": "chunked"})
        elif answer == "no HTTP":
            self.wfile.write(f"cannot serve {CHECK_ID}\r\n".encode())
        else:
            self._answer(*(answer if isinstance(answer, tuple) else (answer, b"OK")))

    do_POST = do_GET  # noqa: N815  # the name that http.server calls

    def _answer(self, status: int, rest: bytes | str) -> None:
        if isinstance(rest, str):
            self._send(status, b"", {"Location": rest})
        else:
            self._send(status, rest, {"Content-Length": str(len(rest))})

    def _drip(self, content: bytes) -> None:
        with suppress(OSError):
            for place in range(len(content)):
                self.wfile.write(content[place : place + 1])
                if self.server.ended.wait(0.1):
                    return

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def monitoring_service(*answers: Any) -> Iterator[Service]:
    """Run the service during the block; without `answers`, it accepts every ping."""
    service = Service(answers or (200,))
    server = _Server(service)
    service.url = f"http://127.0.0.1:{server.server_address[1]}/ping/{CHECK_ID}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield service
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


def refusing_url() -> str:
    """Return a URL at which no server listens."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    return f"http://127.0.0.1:{port}/ping/{CHECK_ID}"


@contextmanager
def took_at_most(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds

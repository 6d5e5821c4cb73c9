"""Proxy between clients and a server's unix socket, which can cut, delay, swallow and half-close connections."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Mode = Literal["pass", "refuse", "swallow", "delay"]


class Proxy:
    """Proxy that listens at `listen` and forwards to `target`. Its methods may be called from any thread."""

    def __init__(self, listen: Path, target: Path) -> None:
        self._listen, self._target = listen, target
        self._loop = asyncio.new_event_loop()
        self._mode: Mode = "pass"
        self._connections: set[asyncio.StreamWriter] = set()

    def set_mode(self, mode: Mode) -> None:
        """Set what happens to data: pass; refuse (close new connections); swallow; delay (each piece by 50 ms)."""
        self._mode = mode

    def cut(self) -> None:
        """Close every connection at once."""
        self._loop.call_soon_threadsafe(self._abort_all)

    def half_close(self) -> None:
        """End one direction of every connection; the peer notices only when it writes."""
        self._loop.call_soon_threadsafe(self._write_eofs)

    def _abort_all(self) -> None:
        for writer in list(self._connections):
            writer.transport.abort()

    def _write_eofs(self) -> None:
        for writer in list(self._connections):
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "refuse":
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, far_writer}
        self._connections |= pair
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        except (OSError, RuntimeError, asyncio.CancelledError):  # RuntimeError: write after a half-close
            pass  # one side is gone; the other one is aborted below
        finally:
            self._connections -= pair
            for one in pair:
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            while self._mode == "swallow":
                await asyncio.sleep(0.02)
            if self._mode == "delay":
                await asyncio.sleep(0.05)
            writer.write(piece)
            await writer.drain()
        writer.write_eof()

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self._listen.name}", daemon=True)
        thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_unix_server(self._serve, self._listen), self._loop)
        server = started.result(10)
        self._listen.chmod(0o777)
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(self._close(server), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(10)
            self._loop.close()

    async def _close(self, server: asyncio.Server) -> None:
        server.close()
        self._abort_all()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

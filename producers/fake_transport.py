"""Sends every producer of this process to a fake Redis and an outbox of its own, for as long as a test takes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

from fakeredis import FakeServer
from redis import Redis

from producers import history_producer, relay, settings
from producers.errors import HistoryError
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox

FAKE_QUEUE = "history"
_LAST_BACKOFF_SECONDS = 0.05  # a test does not wait seconds for the end of an outage to be noticed
_EXIT_SECONDS = 0.2  # most tests close their producers without a worker, for which a real one waits longer
_THREAD_END_SECONDS = 5.0
_REAP_POLLS, _REAP_POLL_SECONDS = 100, 0.005  # with children that live on it ends later, unreaped

VARIABLES = ("REDIS_URL", "HISTORY_OUTBOX", "HISTORY_OUTBOX_KEEP", "HISTORY_QUEUE")

_servers: list[FakeServer] = []
_outlived: WeakSet[threading.Thread] = WeakSet()  # threads of code under test that go on after it


@contextmanager
def redirected(server: FakeServer, fake_redis: Redis, path: Path) -> Iterator[None]:
    """In the block, whatever this process records goes to the outbox at `path` and `fake_redis`, a client of `server`.

    Producers that were made in the block are closed at its end, their threads too; those from before are themselves
    again. Threads that were started in it and go on after it can record no more.
    """
    construct = HistoryProducer.__init__

    def construct_here(
        producer: HistoryProducer,
        redis: Redis | None = None,  # noqa: ARG001  # the caller's own: a test must not reach it
        *,
        outbox: Path | str | None = None,  # noqa: ARG001  # as above
        name: str = "trading-controller",
        queue: str | None = None,  # noqa: ARG001  # as above
    ) -> None:
        construct(producer, fake_redis, outbox=path, name=name, queue=FAKE_QUEUE)

    with ExitStack() as stack:
        stack.enter_context(_environment(path))
        stack.enter_context(_fork_server())
        stack.enter_context(patch.object(settings, "read_environment", _without_dotenv))
        stack.enter_context(patch.object(relay, "_LAST_BACKOFF_SECONDS", _LAST_BACKOFF_SECONDS))
        stack.enter_context(patch.object(history_producer, "EXIT_SECONDS", _EXIT_SECONDS))
        before = list(history_producer._live)
        for producer in before:
            stack.enter_context(_lent(producer, fake_redis, path))
        stack.callback(_close_all_but, before)
        stack.enter_context(patch.object(HistoryProducer, "__init__", construct_here))
        _servers.append(server)
        stack.callback(_servers.remove, server)
        stack.callback(_refuse_what_outlives, set(threading.enumerate()))  # first, before anything is real again
        yield


@contextmanager
def _lent(producer: HistoryProducer, redis: Redis, path: Path) -> Iterator[None]:
    """A producer that was there before records here; its own outbox and relay go on with what they have."""
    own_relay, own_outbox = producer._relay, producer._outbox
    outbox = Outbox(path)
    try:
        with (
            patch.multiple(producer, _redis=redis, _queue=FAKE_QUEUE, _outbox=outbox),
            patch.object(producer, "_relay", producer._new_relay()),
        ):
            try:
                yield
            finally:
                _end(producer)
    finally:
        outbox.close()
        if producer.closed:
            own_relay.stop()
            own_outbox.close()


def _close_all_but(before: list[HistoryProducer]) -> None:
    with ExitStack() as stack:  # each of them, also when one fails
        for producer in history_producer._live.difference(before):
            stack.callback(_end, producer)
            stack.callback(producer.close, timeout=0)


def _end(producer: HistoryProducer) -> None:
    producer._relay.stop()
    if producer._relay._thread is not None:
        producer._relay._thread.join(_THREAD_END_SECONDS)


def _without_dotenv() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if value}


@contextmanager
def _environment(path: Path) -> Iterator[None]:
    """For the processes that this one starts: in place of any real Redis a socket that nobody made."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(zip(VARIABLES, (f"unix://{path.parent}/no-redis", str(path), "7", FAKE_QUEUE), strict=True))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _reap(pid: int) -> None:
    for _ in range(_REAP_POLLS):
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        except ChildProcessError:  # by whoever waits for all children of this process
            return
        time.sleep(_REAP_POLL_SECONDS)


@contextmanager
def _fork_server() -> Iterator[None]:
    """A fork server of its own: one that runs already would give its children the environment from before.

    It is not stopped by multiprocessing's own means, which wait for all its children, but as they are: by closing the
    pipe that it and they watch.
    """
    own = forkserver.ForkServer()
    own.set_forkserver_preload(list(forkserver._forkserver._preload_modules))  # type: ignore[attr-defined]  # not in its stubs
    names = ("ensure_running", "connect_to_new_process", "set_forkserver_preload")
    try:
        with patch.multiple(forkserver, **{name: getattr(own, name) for name in names}):
            yield
    finally:
        alive: int | None = own._forkserver_alive_fd  # type: ignore[attr-defined]  # likewise
        if alive is not None:
            os.close(alive)
            _reap(own._forkserver_pid)  # type: ignore[attr-defined]  # likewise


def _refuse_what_outlives(before: set[threading.Thread]) -> None:
    """A bot's own thread would otherwise record for real from now on, with the settings of the developer."""
    _outlived.update(set(threading.enumerate()) - before)


def _refusing_outlived(method: Any) -> Any:
    @wraps(method)
    def checked(*arguments: Any, **options: Any) -> Any:
        if not _servers and threading.current_thread() in _outlived:
            raise HistoryError(
                "this thread was started in a test that is over: nothing is recorded; end it in the test"
            )
        return method(*arguments, **options)

    return checked


# For good, since nobody knows when such a thread ends; whoever imports this is a test.
for _method in ("__init__", "record_many"):
    setattr(HistoryProducer, _method, _refusing_outlived(getattr(HistoryProducer, _method)))


def _leave_relaying_to_the_parent() -> None:
    # What a forked child has is a copy of the fake server, where nobody would find what it sends.
    for server in _servers:
        server.connected = False
        patch.object(relay.Relay, "start", lambda _: None).start()


os.register_at_fork(after_in_child=_leave_relaying_to_the_parent)

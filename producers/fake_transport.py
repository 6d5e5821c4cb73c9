"""Sends every producer of this process to a fake Redis and an outbox of its own, for as long as a test takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from fakeredis import FakeServer
from redis import Redis

from producers import history_producer, relay, settings
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox

FAKE_QUEUE = "history"
_LAST_BACKOFF_SECONDS = 0.05  # a test does not wait seconds for the end of an outage to be noticed
_THREAD_END_SECONDS = 5.0

VARIABLES = ("REDIS_URL", "HISTORY_OUTBOX", "HISTORY_OUTBOX_KEEP", "HISTORY_QUEUE")

_servers: list[FakeServer] = []


@contextmanager
def redirected(server: FakeServer, fake_redis: Redis, path: Path) -> Iterator[None]:
    """In the block, whatever this process records goes to the outbox at `path` and `fake_redis`, a client of `server`.

    Producers that were made in the block are closed at its end, their threads too; those from before are themselves
    again.
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
        stack.enter_context(patch.object(settings, "read_environment", _without_dotenv))
        stack.enter_context(patch.object(relay, "_LAST_BACKOFF_SECONDS", _LAST_BACKOFF_SECONDS))
        before = list(history_producer._live)
        for producer in before:
            stack.enter_context(_lent(producer, fake_redis, path))
        stack.callback(_close_all_but, before)
        stack.enter_context(patch.object(HistoryProducer, "__init__", construct_here))
        _servers.append(server)
        stack.callback(_servers.remove, server)
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


def _leave_relaying_to_the_parent() -> None:
    # What a forked child has is a copy of the fake server, where nobody would find what it sends.
    for server in _servers:
        server.connected = False
        patch.object(relay.Relay, "start", lambda _: None).start()


os.register_at_fork(after_in_child=_leave_relaying_to_the_parent)

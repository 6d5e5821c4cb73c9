"""A process that only relays: for controllers that cron starts, or that must not share their interpreter with a relay.

It gives signs of life in each outbox, and producers leave relaying to it. It ends nothing that it finds wrong: what
cannot be relayed now is said once, and tried again.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from redis import Redis

from producers.errors import OutboxError
from producers.outbox import Outbox
from producers.relay import Relay

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0  # for an outbox that is not there yet
_END_SECONDS = 10.0


def run_relay(
    outboxes: Sequence[Path], redis: Redis, queue: str, *, keep_seconds: float, stopping: threading.Event
) -> None:
    """Relay these outboxes to the RQ queue until `stopping` is set. One that does not exist yet is waited for.

    Raises:
        RelayRefused: an outbox that is there at the start says that its entries go to another Redis or queue.
    """
    name = f"{socket.gethostname()}:{os.getpid()}"
    relays: list[tuple[Outbox, Relay]] = []
    waiting = [path.absolute() for path in outboxes]
    said: set[Path] = set()
    try:
        while not stopping.is_set():
            for path in list(waiting):
                if not path.is_file():
                    if path not in said:
                        logger.warning("no outbox at %s yet: waiting for a producer to make it", path)
                        said.add(path)
                    continue
                try:
                    outbox = Outbox(path, repair=True)
                    relay = Relay(outbox, redis, queue, keep_seconds=keep_seconds, process_name=name)
                    outbox.retried(relay.check_destination)
                    unsettled = outbox.retried(outbox.status).depth
                except OutboxError as error:
                    if path not in said:
                        logger.error("cannot relay %s: %s; trying again", path, error)
                        said.add(path)
                    continue
                waiting.remove(path)
                relay.start()
                relays.append((outbox, relay))
                logger.info("relaying %s: %d entries are not settled", path, unsettled)
            stopping.wait(_LOOK_SECONDS)
    finally:
        for _, relay in relays:
            relay.stop(_END_SECONDS)
        for outbox, _ in relays:
            outbox.close()
            logger.info("no longer relaying %s", outbox.path)

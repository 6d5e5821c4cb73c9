"""A worker's metrics over HTTP, for as long as it works."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import start_http_server
from redis import Redis

from consumers.ops.exposition import worker_registry
from consumers.ops.queue_health import read_queue
from producers.errors import HistoryError

logger = logging.getLogger(__name__)


@contextmanager
def served_metrics(
    host: str, port: int, *, waits_for: Callable[[], str | None], redis: Redis, queue: str
) -> Iterator[None]:
    """Answer scrapes at `host` and `port` (0: any that is free) from threads of this process, during the block.

    Raises:
        HistoryError: the address cannot be used. Another port would be one that nobody scrapes.
    """
    registry = worker_registry(waits_for, lambda: read_queue(redis, queue))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise HistoryError(f"cannot serve metrics at {host} port {port}: {error.strerror or error}") from error
    try:
        address, bound = server.server_address[:2]
        name = f"[{address!s}]" if ":" in str(address) else address
        logger.info("metrics at http://%s:%d/metrics", name, bound)
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

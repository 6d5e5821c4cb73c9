"""HTTP server for a worker's metrics."""

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
    """Serve the metrics at `host` and `port` (0: any free port) for the duration of the block, in separate threads.

    Raises:
        HistoryError: the address cannot be used. There is no fallback to another port, which nobody would scrape.
    """
    registry = worker_registry(waits_for, lambda: read_queue(redis, queue))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        advice = "choose another address with HISTORY_METRICS_HOST and HISTORY_METRICS_PORT, or --metrics-port"
        raise HistoryError(
            f"cannot serve metrics at {host} port {port}: {error.strerror or error}; {advice}"
        ) from error
    try:
        address, bound = server.server_address[:2]
        name = f"[{address!s}]" if ":" in str(address) else address
        logger.info("serving metrics at http://%s:%d/metrics", name, bound)
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""One model of the pipeline's health: database, queue and outbox, each read once per collection, side by side.

`status`, `/metrics`, `/readyz` and the page each pass their own database query. The queue and the outbox are read here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from consumers.ops.outbox_health import OutboxHealth, outbox_of_settings
from consumers.ops.probes import Probe, Reading, read_side_by_side
from consumers.ops.queue_health import QueueHealth, queue_of_settings

Rows = TypeVar("Rows")


@dataclass(frozen=True)
class Health(Generic[Rows]):
    """Health of the three parts at one moment. If one part cannot be read, the others are still there."""

    database: Reading[Rows]
    queue: Reading[QueueHealth]
    outbox: Reading[OutboxHealth]


class HealthReader(Generic[Rows]):
    """Read the database (by calling `database`), the queue and the outbox at the same time."""

    def __init__(
        self,
        database: Callable[[], Rows],
        queue: Callable[[], QueueHealth | None] = queue_of_settings,
        outbox: Callable[[], OutboxHealth | None] = outbox_of_settings,
    ) -> None:
        self._probes: list[Probe[Any]] = [Probe("database", database), Probe("redis", queue), Probe("outbox", outbox)]

    def read(self, seconds: float) -> Health[Rows]:
        return Health(*read_side_by_side(self._probes, seconds))


_shared: dict[Callable[[], Any], HealthReader[Any]] = {}
# If a thread of the parent has a lock at the fork, it stays locked in the child for ever.
os.register_at_fork(after_in_child=_shared.clear)


def shared_reader(
    database: Callable[[], Rows], *, outbox: Callable[[], OutboxHealth | None] = outbox_of_settings
) -> HealthReader[Rows]:
    """Return this process's reader for `database`: concurrent requests share it and read each server once."""
    return _shared.setdefault(database, HealthReader(database, outbox=outbox))

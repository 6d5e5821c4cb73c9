"""Capacity of this machine's outbox: its size, how fast it grows, and when it will be full."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from consumers.ops.outbox_health import has_outbox
from producers.entries import OutboxGrowth
from producers.errors import OutboxError
from producers.outbox import MAX_BYTES, Outbox
from producers.settings import TransportSettings

GROWTH_SECONDS = 300.0
# The pages of the empty tables are a large part of a smaller file, so the bytes per entry are not known.
_SMALLEST_BYTES = 2**20


@dataclass(frozen=True)
class OutboxCapacity:
    """Bytes in use, of at most MAX_BYTES, and how many more of them unsettled entries take per second.

    `growth_bytes_per_second` is negative while more entries are settled than recorded, and None if it is not known.
    `full_in_seconds` is None too if the outbox does not grow.
    """

    used_bytes: int
    growth_bytes_per_second: float | None = None
    full_in_seconds: float | None = None


def outbox_capacity_of_settings() -> OutboxCapacity | None:
    """Measure the outbox of the settings. Returns None if this machine has none.

    Raises:
        OutboxError: the outbox cannot be read.
        SettingsError: a setting is invalid.
    """
    path = TransportSettings.from_environment().outbox
    if not has_outbox(path):
        return None
    with Outbox(path) as outbox:
        used_bytes, growth = outbox.used_bytes(), outbox.growth(GROWTH_SECONDS)
    try:
        free_bytes = shutil.disk_usage(path).free
    except OSError as error:
        raise OutboxError(f"outbox {path}: {error.strerror or error}") from error
    return outbox_capacity(used_bytes, growth, free_bytes)


def outbox_capacity(used_bytes: int, growth: OutboxGrowth | None, free_bytes: int) -> OutboxCapacity:
    """Compute the capacity from the bytes in use, the growth in entries, and the free bytes of the disk.

    Settled entries may be deleted before the outbox is full, so `full_in_seconds` is the earliest time.
    """
    if growth is None or used_bytes < _SMALLEST_BYTES or growth.kept == 0 or growth.seconds < 1.0:
        return OutboxCapacity(used_bytes)
    # The newest events may be larger than the mean of all, for example archives after many snapshots.
    entry_bytes = max(used_bytes / growth.kept, growth.event_bytes)
    bytes_per_second = growth.entries / growth.seconds * entry_bytes
    room_bytes = max(min(MAX_BYTES - used_bytes, free_bytes), 0)
    full_in_seconds = room_bytes / bytes_per_second if bytes_per_second > 0 else None
    return OutboxCapacity(used_bytes, bytes_per_second, full_in_seconds)

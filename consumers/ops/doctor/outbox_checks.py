"""The outbox of this machine: what waits in it, and whether it lies where nothing is lost."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from redis import Redis

from consumers.ops.doctor.checks import Check, duration, looked, size
from consumers.ops.doctor.file_systems import in_container, mount_of, mounts_text
from consumers.ops.doctor.masking import Mask
from producers.acknowledgements import shown
from producers.errors import OutboxError, OutboxOutdated
from producers.lateness import oldest_unacknowledged_seconds
from producers.outbox import MAX_BYTES, Outbox
from producers.outbox_salvage import ranges_text
from producers.redis_keys import token_key
from producers.settings import TransportSettings, read_environment

_ADVICE = "mend what it names, or keep the file for later and set HISTORY_OUTBOX to a new one"
_CHECK_SECONDS = 3.0
_OLD_SECONDS = 600.0
_VERY_OLD_SECONDS = 86400.0
_HIGH_SHARE = 0.5  # settled entries leave then, so what is above is not settled
_FULL_SHARE = 0.9
_LITTLE_DISK_BYTES = 2**30
_NO_DISK_BYTES = 64 * 2**20


def outbox_checks(settings: TransportSettings, mask: Mask) -> Iterator[Check]:
    """Of the file and its place; one line where there is none, as on a worker's host."""
    path = settings.outbox
    if not path.is_file():
        yield Check("outbox", "ok", f"none at {path.absolute()}: nothing was ever recorded here (a worker has none)")
        if "HISTORY_OUTBOX" not in read_environment() or not path.absolute().parent.is_dir():
            return
    else:
        try:
            Outbox(path).close()
        except OutboxOutdated as error:
            yield Check("outbox", "warn", mask.told(error), "start its controller of this release, and ask again")
        except OutboxError:
            yield from _looks_inside(settings, mask)  # which says why
        else:
            yield from _looks_inside(settings, mask)
        yield from looked("outbox access", partial(access, path), mask)
    yield from looked("outbox place", lambda: [place_check(path, mounts_text(), in_container=in_container())], mask)
    yield from looked("outbox disk", lambda: [disk_check(shutil.disk_usage(path.absolute().parent).free)], mask)


def _looks_inside(settings: TransportSettings, mask: Mask) -> Iterator[Check]:
    yield from looked("outbox", partial(contents, settings), mask, advice=_ADVICE)
    yield from looked("outbox file", partial(soundness, settings.outbox), mask, advice=_ADVICE)
    yield from looked("outbox copies", partial(copies, settings), mask)


def contents(settings: TransportSettings) -> Iterator[Check]:
    """How much waits and for how long, what was rejected, how full it is. Raises OutboxError."""
    with Outbox(settings.outbox) as outbox, _redis_of(settings) as redis:
        status, used = outbox.status(), outbox.used_bytes()
        age = oldest_unacknowledged_seconds(outbox, redis)
        forsaken = age is not None and age > _OLD_SECONDS and _nobody_relays(outbox)
    found = f"{status.pending} pending, {status.sent} sent" + (
        "" if age is None else f", the oldest {duration(age)} old"
    )
    if age is None or age <= _OLD_SECONDS:
        yield Check("outbox", "ok", found)
    elif forsaken:
        yield Check(
            "outbox",
            "fail",
            f"{found}; no process sends them",
            "start the controller, trading-history relay, or trading-history outbox flush",
        )
    else:
        advice = "look at the lines about Redis, workers and PostgreSQL"
        yield Check("outbox", "fail" if age > _VERY_OLD_SECONDS else "warn", found, advice)
    yield Check(
        "outbox rejections",
        "warn" if status.rejected else "ok",
        str(status.rejected or "none"),
        "trading-history failed list, on a machine that reaches the database" if status.rejected else "",
    )
    yield size_check(used)


def soundness(path: Path) -> Iterator[Check]:
    """Whether SQLite finds the file in order; damaged files that were moved away."""
    name = "outbox file"
    with Outbox(path) as outbox:
        fault = outbox.quick_check(_CHECK_SECONDS)
        waiting, done = outbox.quarantine.damaged_files(), outbox.quarantine.salvaged_files()
        losses = outbox.quarantine.losses()
    if fault not in (None, "unfinished"):
        advice = "check the disk, then restart the controller or relay: it moves the file away and salvages it"
        yield Check(name, "fail", f"damaged: {fault}", advice)
    elif waiting:
        found = f"damaged files that are not salvaged yet: {', '.join(map(str, waiting))}"
        yield Check(name, "fail", found, "start the controller or trading-history relay, which salvage their entries")
    elif done:
        lost = "; ".join(f"{source}: {ranges_text(ranges)}" for source, ranges in losses.items())
        lost = lost or "none after the first that was found"
        found = f"salvaged after damage: {', '.join(map(str, done))}. Numbers that could not be read: {lost}"
        yield Check(name, "warn", found, "run trading-history audit, look at the disk, then delete the salvaged file")
    else:
        seen = "sound" if fault is None else f"no fault found in {_CHECK_SECONDS:.0f} s"
        yield Check(name, "ok", seen)


def copies(settings: TransportSettings) -> Iterator[Check]:
    """Whether another copy of this outbox is in use, by what the relays have noticed and by the token in Redis."""
    name = "outbox copies"
    advice = "trading-history audit on the host of each copy; give each controller an outbox of its own"
    with Outbox(settings.outbox) as outbox:
        sources, header = outbox.sources(), outbox.header.read()
    current = [source.full_name for source in sources if source.current]
    left = [source.full_name for source in sources if source.left_because == "copied"]
    if redis_is_set := settings.redis_url is not None:
        with settings.redis() as redis:
            tokens = redis.mget([token_key(source) for source in current]) if current else []
        known = {header.token, header.next_token, None}
        if any((None if token is None else shown(token)) not in known for token in tokens):
            yield Check(name, "warn", f"another copy uses {', '.join(current)} now", advice)
            return
    if left:
        yield Check(name, "warn", f"copied or restored: it has left {', '.join(left)} to another copy", advice)
    else:
        unasked = "" if redis_is_set else " (Redis was not asked: REDIS_URL is not set)"
        yield Check(name, "ok", f"no other copy found{unasked}")


def _redis_of(settings: TransportSettings) -> AbstractContextManager[Redis | None]:
    return nullcontext() if settings.redis_url is None else settings.redis()


def _nobody_relays(outbox: Outbox) -> bool:
    """Whether no producer of any process has its relay's lock; it is let go of at once."""
    lock = outbox.relay_lock()
    try:
        return lock.acquire()
    finally:
        lock.release()


def size_check(used_bytes: int) -> Check:
    share = used_bytes / MAX_BYTES
    found = f"{size(used_bytes)}, {share:.0%} of its limit"
    if share <= _HIGH_SHARE:
        return Check("outbox size", "ok", found)
    return Check(
        "outbox size",
        "fail" if share > _FULL_SHARE else "warn",
        found,
        "a full outbox accepts no event: get Redis and workers to run",
    )


def access(path: Path) -> Iterator[Check]:
    """Who may write it: SQLite needs the folder as well."""
    name, status = "outbox access", path.stat()
    closed = [str(one) for one in (path, path.absolute().parent) if not os.access(one, os.W_OK)]
    ours = status.st_uid == os.geteuid()
    found = f"{stat.filemode(status.st_mode)}, of user {status.st_uid}"
    if closed:
        # Another account's outbox need not be open to us.
        yield Check(
            name,
            "fail" if ours else "warn",
            f"{found}; we may not write {' and '.join(closed)}",
            "chmod u+w them" if ours else "run doctor as the controller's user",
        )
    elif status.st_mode & stat.S_IWOTH:
        yield Check(name, "warn", f"{found}: anybody may write it", f"chmod o-w {path}")
    else:
        yield Check(name, "ok", found)


def place_check(path: Path, mounts: str | None, *, in_container: bool) -> Check:
    """`mounts` is the text of a mountinfo. An outbox must outlive the process, the machine's restart, the container."""
    name, resolved = "outbox place", path.resolve()
    mount = None if mounts is None else mount_of(resolved, mounts)
    on = "" if mount is None else f" on {mount.type} ({mount.point})"
    found = f"{resolved}{on}"
    local = "set HISTORY_OUTBOX to a file on local disk"
    if mount is not None and mount.on_network:
        return Check(name, "fail", f"{found}, over the network: its locks cannot be trusted", local)
    if mount is not None and mount.in_memory:
        return Check(name, "fail", f"{found}, in memory: accepted events are gone after a restart", local)
    if mount is not None and mount.is_layer and in_container:
        advice = "put it on a volume: accepted events are gone when the container is removed"
        return Check(name, "fail", f"{found}, in the container's own layer", advice)
    if not path.is_absolute():
        advice = f"HISTORY_OUTBOX={resolved}, where the controller runs too"
        return Check(name, "warn", f"{found}; {path} is relative: another one in another folder", advice)
    return Check(name, "ok", found)


def disk_check(free_bytes: int) -> Check:
    found = f"{size(free_bytes)} free"
    if free_bytes >= _LITTLE_DISK_BYTES:
        return Check("outbox disk", "ok", found)
    advice = f"make room: an outbox may grow to {size(MAX_BYTES)}, and accepts no event on a full disk"
    return Check("outbox disk", "fail" if free_bytes < _NO_DISK_BYTES else "warn", found, advice)

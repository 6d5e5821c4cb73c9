"""The outbox of this machine: what waits in it, and whether it lies where nothing is lost."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from consumers.doctor.checks import Check, duration, looked, size
from consumers.doctor.file_systems import in_container, mount_of, mounts_text
from consumers.doctor.masking import Mask
from producers.outbox import MAX_BYTES, Outbox
from producers.settings import TransportSettings, read_environment

_ADVICE = "mend what it names, or keep the file for later and set HISTORY_OUTBOX to a new one"
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
        yield from looked("outbox", partial(contents, path), mask, advice=_ADVICE)
        yield from looked("outbox access", partial(access, path), mask)
    yield from looked("outbox place", lambda: [place_check(path, mounts_text(), in_container=in_container())], mask)
    yield from looked("outbox disk", lambda: [disk_check(shutil.disk_usage(path.absolute().parent).free)], mask)


def contents(path: Path) -> Iterator[Check]:
    """How much waits and for how long, what was rejected, how full it is. Raises OutboxError."""
    with Outbox(path) as outbox:
        status, used = outbox.status(), outbox.used_bytes()
        age = None if status.oldest_unsettled is None else time.time() - status.oldest_unsettled
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
            "start the controller, or trading-history outbox flush",
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

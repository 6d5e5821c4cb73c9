"""File operations of the outbox: file ids, a folder lock, owners, copies, free names."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from producers.errors import OutboxError

_COPY_BYTES = 2**20

FileId = tuple[int, int]  # device and inode


def file_id(path: Path) -> FileId | None:
    """Return device and inode of the file at `path`, or None if there is no file."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutboxError(f"outbox {path}: {error.strerror or error}") from error
    return found.st_dev, found.st_ino


def file_size(path: Path) -> int | None:
    """Return the size of a file in bytes, or None if there is no file or it cannot be accessed."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def has_hard_link(path: Path) -> bool:
    """Return whether the file has a second name."""
    try:
        return os.stat(path).st_nlink > 1
    except OSError:
        return False


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Translate the system's errors into OutboxError, which names the file."""
    try:
        yield
    except OSError as error:
        raise OutboxError(f"outbox {path}: {error.strerror or error}") from error


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block; the kernel releases the lock when the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # gevent's `os.close` closes the descriptor of a folder later
        os.close(descriptor)


def make_as_root(path: Path, like: Path) -> None:
    """If the user is root and `path` does not exist, create an empty file with the owner, group and mode of `like`.

    Otherwise a command that an operator runs as root would create files that the producer cannot write. `like` may be a
    folder.
    """
    if os.geteuid() != 0:
        return
    try:
        found = os.stat(like)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (FileExistsError, FileNotFoundError):
        return
    try:
        with suppress(OSError):  # not permitted in some containers
            os.fchown(descriptor, found.st_uid, found.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & (0o664 if stat.S_ISDIR(found.st_mode) else 0o666))
    finally:
        os.close(descriptor)


def copy_file(file: Path, copy: Path) -> None:
    """Copy a file with its owner and mode, and sync the copy to disk."""
    # Never closed: closing it would release the locks that SQLite has on the file in this process.
    source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    found = os.fstat(source)
    copy.unlink(missing_ok=True)  # left by a process that died
    target = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if os.geteuid() == 0:
            with suppress(OSError):  # not permitted in some containers
                os.fchown(target, found.st_uid, found.st_gid)
        os.fchmod(target, stat.S_IMODE(found.st_mode))
        while part := os.read(source, _COPY_BYTES):
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(target, rest) :]
        os.fsync(target)
    finally:
        os.close(target)


def free_name(wanted: Path) -> Path:
    """Return the wanted path, or the path with a number appended if the file exists."""
    name, number = wanted, 1
    while name.exists():
        number += 1
        name = wanted.with_name(f"{wanted.name}-{number}")
    return name

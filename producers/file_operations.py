"""File operations of the outbox: ids of files, a lock on a folder, owners, copies, free names."""

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
    """Device and inode of the file at `path`; None if there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutboxError(f"outbox {path}: {error.strerror or error}") from error
    return found.st_dev, found.st_ino


def file_size(path: Path) -> int | None:
    """In bytes; None when there is no such file, or it cannot be seen."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def has_hard_link(path: Path) -> bool:
    """Whether the file has a second name."""
    try:
        return os.stat(path).st_nlink > 1
    except OSError:
        return False


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """The system's errors as OutboxError, which names the file."""
    try:
        yield
    except OSError as error:
        raise OutboxError(f"outbox {path}: {error.strerror or error}") from error


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One process at a time is in such a block; the kernel releases the lock when the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_as_root(path: Path, like: Path) -> None:
    """If this is root and there is no such file, make an empty one with the owner, group and mode of `like`.

    Else an operator's command would leave files that the producer may not write. `like` may be a folder.
    """
    if os.geteuid() != 0:
        return
    try:
        found = os.stat(like)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (FileExistsError, FileNotFoundError):
        return
    try:
        with suppress(OSError):  # in some containers root may not
            os.fchown(descriptor, found.st_uid, found.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & (0o664 if stat.S_ISDIR(found.st_mode) else 0o666))
    finally:
        os.close(descriptor)


def copy_file(file: Path, copy: Path) -> None:
    """Copy content, owner and mode, and wait for the disk."""
    # Never closed: closing it would end the locks that SQLite has on the file in this process.
    source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    found = os.fstat(source)
    copy.unlink(missing_ok=True)  # of a process that died
    target = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if os.geteuid() == 0:
            with suppress(OSError):  # in some containers root may not
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
    """The wanted path, with a number behind it if there is such a file."""
    name, number = wanted, 1
    while name.exists():
        number += 1
        name = wanted.with_name(f"{wanted.name}-{number}")
    return name

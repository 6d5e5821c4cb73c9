"""Where on this machine a file lies, from the kernel's table of mounts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

_MOUNTS = Path("/proc/self/mountinfo")
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
_NETWORK = re.compile(r"nfs\d?|cifs|smb\w*|9p|ceph|glusterfs|afs|lustre|gpfs|beegfs|virtiofs|fuse\..+|fuse")
_MEMORY = ("tmpfs", "ramfs")
_LAYERS = ("overlay", "aufs")


@dataclass(frozen=True)
class Mount:
    """A mounted file system: its type as the kernel names it, and where it is mounted."""

    type: str
    point: PurePath

    @property
    def on_network(self) -> bool:
        return _NETWORK.fullmatch(self.type) is not None

    @property
    def in_memory(self) -> bool:
        return self.type in _MEMORY

    @property
    def is_layer(self) -> bool:
        return self.type in _LAYERS


def mounts_text() -> str | None:
    """The table of this process; None where the kernel has none (macOS)."""
    return _MOUNTS.read_text("utf-8", "surrogateescape") if _MOUNTS.exists() else None


def in_container() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ or any(Path(mark).exists() for mark in _CONTAINER_MARKS)


def mount_of(path: PurePath, mounts: str) -> Mount | None:
    """The mount that an absolute path without links is on, in the text of a mountinfo (proc(5))."""
    best: Mount | None = None
    for line in mounts.splitlines():
        fields, separator, rest = line.partition(" - ")
        if not separator or len(fields.split(" ")) < 5:
            continue
        point = PurePath(_unescaped(fields.split(" ")[4]))
        # Later lines are mounted over earlier ones.
        if path.is_relative_to(point) and (best is None or len(point.parts) >= len(best.point.parts)):
            best = Mount(rest.split(" ")[0], point)
    return best


def _unescaped(name: str) -> str:
    """Blanks and the like stand there as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)

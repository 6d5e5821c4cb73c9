"""The old controller's JSON history: whether somebody still appends to it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from consumers.legacy.legacy_json import history_files
from consumers.ops.doctor.checks import Check, duration

DEFAULT_FOLDER = Path("data/history")
_RECENT_SECONDS = 3 * 86400.0


def json_history(folders: Sequence[Path]) -> Iterator[Check]:
    """Files of the old formats that were written in the last three days. Raises OSError."""
    name, now = "JSON history", time.time()
    files = [file for folder in folders for file in history_files(folder)]
    ages = {file: now - file.stat().st_mtime for file in files}
    recent = {file: age for file, age in ages.items() if age < _RECENT_SECONDS}
    if recent:
        newest = min(recent, key=lambda file: recent[file])
        yield Check(
            name,
            "warn",
            f"{newest} was written {duration(recent[newest])} ago"
            + (f", {len(recent) - 1} more in the last 3 days" if len(recent) > 1 else ""),
            "does an old controller still append? Switch it, then trading-history import for what it wrote",
        )
    elif files:
        yield Check(name, "ok", f"{len(files)} files, none written in the last 3 days")
    else:
        yield Check(name, "ok", f"none in {', '.join(str(folder.absolute()) for folder in folders)}")

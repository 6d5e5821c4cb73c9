"""The import's report: one line of JSON for each entry that could not be taken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self, TextIO

import simplejson

from producers.errors import HistoryError


class Report:
    """Written line by line from the first rejected entry on; without one there is no file.

    An earlier report of the name is kept as `<name>.1`, `<name>.2` and so on: this run may see less.

    Raises:
        HistoryError: the file cannot be written; raised before the import begins.
    """

    def __init__(self, path: Path) -> None:
        if not os.access(path.parent, os.W_OK) or path.is_dir():
            raise HistoryError(f"{path}: the report could not be written there")
        self.path = path
        self.lines = 0
        self._file: TextIO | None = None

    def add(self, file: str, index: int, reason: str, entry: Any) -> None:
        """Raises OSError when it cannot be written."""
        if self._file is None:
            self._file = self.path.open("w", encoding="ascii")
        self._file.write(as_json({"file": file, "index": index, "reason": reason, "entry": entry}) + "\n")
        self.lines += 1

    def _keep_earlier(self) -> None:
        if self.path.is_file() and not self.path.is_symlink():  # not a device or a pipe that somebody has named
            number = 1
            while (kept := self.path.with_name(f"{self.path.name}.{number}")).exists():
                number += 1
            self.path.rename(kept)

    def __enter__(self) -> Self:
        self._keep_earlier()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def as_json(value: Any) -> str:
    """On one line, in ASCII: an entry with characters that are no Unicode must not be lost.

    Numbers keep their digits; NaN stays NaN, as the old controller wrote it.
    """
    text: str = simplejson.dumps(value, use_decimal=True, allow_nan=True)
    return text

"""The import's report: one line of JSON for each rejected entry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self, TextIO

import simplejson

from producers.errors import HistoryError


class Report:
    """Report file, created with the first rejected entry: without one there is no file.

    An earlier report of the same name is kept as `<name>.1`, `<name>.2` and so on, because this run may see fewer
    entries.

    Raises:
        HistoryError: the file cannot be written. The constructor raises it, before the import begins.
    """

    def __init__(self, path: Path) -> None:
        if not os.access(path.parent, os.W_OK) or path.is_dir():
            raise HistoryError(f"{path}: the report cannot be written there")
        self.path = path
        self.lines = 0
        self._file: TextIO | None = None

    def add(self, file: str, index: int, reason: str, entry: Any) -> None:
        """Write one line. Raises OSError if it cannot be written."""
        if self._file is None:
            self._file = self.path.open("w", encoding="ascii")
        self._file.write(as_json({"file": file, "index": index, "reason": reason, "entry": entry}) + "\n")
        self.lines += 1

    def _keep_earlier(self) -> None:
        if self.path.is_file() and not self.path.is_symlink():  # not a device or a pipe
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
    """Return `value` as one line of JSON in ASCII, which also represents lone surrogates.

    Numbers keep all their digits. NaN stays NaN, as the old controller wrote it.
    """
    text: str = simplejson.dumps(value, use_decimal=True, allow_nan=True)
    return text

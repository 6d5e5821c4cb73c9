"""A copy of the project, in which one file at a time is mutated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
_SOURCES = ("producers", "consumers", "tests", "schema.sql", "pyproject.toml", "README.md", "docker-compose.yml")
_times = count(1_000_000_000)


def copy_tree(root: Path, folder: Path) -> Path:
    """Copy the project into `folder`; returns the copy."""
    tree = folder / "tree"
    tree.mkdir()
    for source in (root / name for name in _SOURCES):
        if source.is_dir():
            shutil.copytree(source, tree / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, tree / source.name)
    return tree


@contextmanager
def mutated(tree: Path, mutant: Mutant) -> Iterator[None]:
    """Have the mutant's text in its file, inside the block."""
    file = tree / mutant.path
    text, stat = file.read_bytes(), file.stat()
    file.write_text(mutant.text, "utf-8")
    # Python compiles a file again if its time in seconds or its size has changed.
    moment = next(_times)
    os.utime(file, (moment, moment))
    try:
        yield
    finally:
        file.write_bytes(text)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

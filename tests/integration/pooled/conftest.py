"""Tests that run a second time, through pgbouncer in transaction mode: here `pair` has its address."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from consumers.embedded import Addresses
from tests.pgbouncer import pooler


@pytest.fixture(scope="session")
def pair(pair: Addresses) -> Iterator[Addresses]:
    """The servers of this run, with pgbouncer in front of PostgreSQL."""
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)  # pgbouncer runs as another account
        with pooler(pair, Path(folder)) as addresses:
            yield addresses

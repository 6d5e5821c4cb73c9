"""Tests that run again on an old PostgreSQL: `pair` uses the one of a Debian package.

14 is the oldest version that this project supports. 15 also lacks the newer features, but only in 14 can every role
create objects in the schema public until schema.sql has run: with 15 that part is not tested.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from consumers.embedded import Addresses, postgres
from consumers.embedded.installation import installed
from tests.conftest import make_template

_PROGRAMS = "/usr/lib/postgresql/{}/bin"
_VERSIONS = ("14", "15")


@pytest.fixture(scope="session")
def pair(pair: Addresses) -> Iterator[Addresses]:
    """The Valkey of this run and an old PostgreSQL, with a template database that has the tables."""
    version = next((one for one in _VERSIONS if Path(_PROGRAMS.format(one), "initdb").exists()), None)
    if version is None:
        pytest.fail(f"no PostgreSQL {' or '.join(_VERSIONS)} in /usr/lib/postgresql: apt-get install postgresql-15")
    programs = Path(_PROGRAMS.format(version))
    installation = replace(installed(), postgres_bin=programs, postgres_version=version)
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        home = Path(folder)
        home.chmod(0o711)  # PostgreSQL's account must reach it
        server = postgres.server(home)
        with (home / "lock").open("w") as lock:
            try:
                postgres.start(server, home, installation, lock)
                server.stop()
                with (server.argument / "postgresql.conf").open("a") as settings:
                    settings.write("max_prepared_transactions = 2\n")
                addresses = Addresses(postgres.start(server, home, installation, lock), pair.redis_url)
                make_template(addresses)
                yield addresses
            finally:
                server.stop()

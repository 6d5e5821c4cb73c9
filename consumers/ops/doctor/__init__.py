"""What is wrong with this installation and what to do about it: each look bounded in time, none stopping the others.

A failed check (`fail`) is what loses events or keeps them from being stored; a warning is what a person should look
at. Nothing is changed, except that the embedded servers are started when no others are set, as for any command.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from consumers.embedded.stack import embedded_home, stack
from consumers.ops.doctor.checks import Check, Look, looked, side_by_side
from consumers.ops.doctor.json_files import json_history
from consumers.ops.doctor.masking import Mask
from consumers.ops.doctor.outbox_checks import outbox_checks
from consumers.ops.doctor.setting_checks import (
    DATABASE,
    REDIS,
    SETTING_ADVICE,
    database_setting,
    other_settings,
    redis_setting,
    time_zone_setting,
)
from consumers.ops.doctor.software_checks import has_database_driver, packages, rq_version
from consumers.settings import StoreSettings
from producers.errors import SettingsError
from producers.settings import TransportSettings, read_environment

__all__ = ["Check", "diagnose"]

_LOOK_SECONDS = 8.0
_EMBEDDED_ADVICE = "mend what it names, or set DATABASE_URL and REDIS_URL to servers of your own"
_DATABASE_ADVICE = "does it run, and are its address, user and password right? DATABASE_URL or POSTGRES_ variables"
_REDIS_ADVICE = "does it run, and are its address, user and password right? REDIS_URL"


def diagnose(history_folders: Sequence[Path]) -> list[Check]:
    """Every check, in the order of the pipeline's parts; `history_folders` may hold the old JSON files.

    Takes at most 8 seconds beside the start of embedded servers.
    """
    try:
        mask = Mask.of(read_environment())
    except SettingsError as error:
        return [Check("settings", "fail", str(error), "mend the .env in this folder")]
    checks = [
        *looked(DATABASE, database_setting, mask, advice=SETTING_ADVICE),
        *looked(REDIS, redis_setting, mask, advice=SETTING_ADVICE),
        *looked("time zone setting", time_zone_setting, mask, advice=SETTING_ADVICE),
        *looked("settings", other_settings, mask),
    ]
    with ExitStack() as servers:
        if all(check.status == "ok" for check in checks):
            checks += looked("embedded servers", partial(_start_embedded, servers), mask, advice=_EMBEDDED_ADVICE)
        return checks + side_by_side(_groups(checks, history_folders, mask), mask, _LOOK_SECONDS)


def _start_embedded(servers: ExitStack) -> Iterator[Check]:
    """When nothing is set; they run until `servers` is closed. Raises SettingsError, EmbeddedError."""
    if _nothing_set():
        home = embedded_home()
        servers.enter_context(stack(database=True, redis=True))
        yield Check("embedded servers", "ok", f"started in {home}, stopped again unless somebody else uses them")


def _nothing_set() -> bool:
    return not StoreSettings.from_environment().is_set and "REDIS_URL" not in read_environment()


def _groups(checks: Iterable[Check], history_folders: Sequence[Path], mask: Mask) -> dict[str, Look]:
    """What can be looked at with these settings."""
    wrong = {check.name for check in checks if check.status == "fail"}
    groups: dict[str, Look] = {}
    if DATABASE not in wrong and has_database_driver() and StoreSettings.from_environment().is_set:
        groups["PostgreSQL"] = partial(_postgres, mask)
    if REDIS not in wrong and "REDIS_URL" in read_environment():
        groups["Redis"] = partial(_redis, mask)
    groups["outbox"] = lambda: outbox_checks(TransportSettings.from_environment(), mask)
    groups["JSON history"] = lambda: json_history(history_folders)
    groups["RQ"] = rq_version
    groups["packages"] = packages
    return groups


def _postgres(mask: Mask) -> Iterator[Check]:
    # Not at the top: a controller's host has no database driver.
    from consumers.ops.doctor.postgres_checks import POSTGRES, postgres_checks

    url = StoreSettings.from_environment().url()
    return looked(POSTGRES, lambda: postgres_checks(url, mask), mask, advice=_DATABASE_ADVICE)


def _redis(mask: Mask) -> Iterator[Check]:
    from consumers.ops.doctor.redis_checks import REDIS as SERVER
    from consumers.ops.doctor.redis_checks import redis_checks

    settings = TransportSettings.from_environment()
    return looked(SERVER, lambda: redis_checks(settings, mask), mask, advice=_REDIS_ADVICE)

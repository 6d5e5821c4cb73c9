"""Checks of this installation: settings, servers, queue, outbox, and files of the old controller.

They change nothing. If no servers are set, the embedded servers are started, as for any command.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from consumers.embedded.stack import embedded_home, stack
from consumers.ops.checks import HealthCheck, check_result, checks_or_error, duration
from consumers.ops.masking import Mask
from consumers.ops.outbox_health import has_outbox, outbox_copy_checks, outbox_file_checks, outbox_of_settings
from consumers.ops.probes import Probe, read_side_by_side
from consumers.ops.redis_health import redis_checks
from consumers.ops.settings_health import DATABASE, REDIS, has_database_driver, rq_checks, setting_checks
from consumers.settings import LoginSettings, StoreSettings
from producers.errors import SettingsError
from producers.settings import TransportSettings, read_environment

READ_SECONDS = 8.0
_RECENT_SECONDS = 3 * 86400.0
_SERVER_ADVICE = "check that the server runs, and its address, user and password in"

FindFiles = Callable[[], Sequence[Path]]


class Part(NamedTuple):
    """Checks that are read together, and the advice if they fail."""

    name: str
    read: Callable[[], Iterable[HealthCheck]]
    advice: str = ""


def diagnose(old_files: FindFiles) -> list[HealthCheck]:
    """Return all checks, in the order of the pipeline's parts. `old_files` finds the JSON files of an old controller.

    Takes at most 8 s, plus the start of the embedded servers.
    """
    try:
        mask = Mask.of(read_environment())
    except SettingsError as error:
        return [HealthCheck("settings", "fail", str(error), "correct the file .env in this folder")]
    checks = [*setting_checks(mask)]
    with ExitStack() as servers:
        if all(one.state == "ok" for one in checks):
            advice = "correct the cause, or set DATABASE_URL and REDIS_URL to your own servers"
            checks += checks_or_error("embedded servers", partial(_start_embedded, servers), mask, advice=advice)
        failed = {one.name for one in checks if one.state == "fail"}
        return [*checks, *_read(_parts(failed, old_files, mask), mask)]


def _start_embedded(servers: ExitStack) -> Iterator[HealthCheck]:
    """Start the embedded servers if no servers are set; they run until `servers` is closed.

    Raises SettingsError, EmbeddedError.
    """
    if not StoreSettings.from_environment().is_set and "REDIS_URL" not in read_environment():
        home = embedded_home()
        servers.enter_context(stack(database=True, redis=True))
        yield HealthCheck(
            "embedded servers", "ok", f"started in {home}; stopped afterwards unless another process uses them"
        )


def _parts(failed: set[str], old_files: FindFiles, mask: Mask) -> list[Part]:
    """Return the parts that can be read with these settings."""
    parts = [
        Part("outbox", partial(_outbox, mask)),
        Part("JSON history", partial(_old_files, old_files)),
        Part("RQ", rq_checks),
    ]
    if REDIS not in failed and "REDIS_URL" in read_environment():
        parts.insert(0, Part("Redis", partial(_redis, mask), f"{_SERVER_ADVICE} REDIS_URL"))
    if DATABASE not in failed and has_database_driver() and StoreSettings.from_environment().is_set:
        advice = f"{_SERVER_ADVICE} DATABASE_URL or the POSTGRES_ variables"
        parts.insert(0, Part("PostgreSQL", partial(_database, mask), advice))
    return parts


def _read(parts: Sequence[Part], mask: Mask) -> Iterator[HealthCheck]:
    """Read all parts at the same time. A part that takes too long becomes one failed check."""

    def reader(part: Part) -> Callable[[], list[HealthCheck]]:
        return lambda: [*checks_or_error(part.name, part.read, mask, advice=part.advice)]

    probes = [Probe(part.name, reader(part)) for part in parts]
    for part, reading in zip(parts, read_side_by_side(probes, READ_SECONDS), strict=True):
        if reading.error is not None:
            advice = "check name resolution, the network, and network file systems"
            yield HealthCheck(part.name, "fail", mask.masked_first_line(reading.error), advice)
        yield from reading.value or ()


def _database(mask: Mask) -> Iterator[HealthCheck]:
    # Imported here, because a controller's host has no database driver.
    from consumers.ops.database_health import database_checks

    return database_checks(StoreSettings.from_environment().url(), mask, LoginSettings.from_environment())


def _redis(mask: Mask) -> Iterator[HealthCheck]:
    return redis_checks(TransportSettings.from_environment(), mask)


def _outbox(mask: Mask) -> Iterator[HealthCheck]:
    settings = TransportSettings.from_environment()
    path = settings.outbox
    if not has_outbox(path):
        yield HealthCheck(
            "outbox", "ok", f"none at {path.absolute()}: nothing has been recorded here (a worker's host has no outbox)"
        )
        return
    try:
        health = outbox_of_settings(ask_relay=True)
        yield from health.checks() if health is not None else ()
    except Exception as error:
        advice = "correct the cause, or keep the file for later and set HISTORY_OUTBOX to a new path"
        yield HealthCheck("outbox", "fail", mask.masked_first_line(error), advice)
    yield from checks_or_error("outbox file", lambda: outbox_file_checks(path), mask, advice="check the disk")
    yield from checks_or_error("outbox copies", lambda: outbox_copy_checks(settings), mask)


def _old_files(find: FindFiles) -> Iterator[HealthCheck]:
    """Yield the check for JSON files that were written in the last 3 days. Raises OSError."""
    now = time.time()
    ages = {file: now - file.stat().st_mtime for file in find()}
    recent = sorted((age, file) for file, age in ages.items() if age < _RECENT_SECONDS)
    problem = ""
    if recent:
        age, newest = recent[0]
        problem = f"{newest} was written {duration(age)} ago"
        problem += f", {len(recent) - 1} more in the last 3 days" if len(recent) > 1 else ""
    found = f"{len(ages)} files, none written in the last 3 days" if ages else "no files"
    advice = "if an old controller still writes them, switch it to this package, then run trading-history import"
    yield check_result("JSON history", found, problem, advice=advice, state="warn")

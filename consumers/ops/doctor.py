"""Facts of this installation with an advice each: settings, servers, queue, outbox, and files of the old controller.

Nothing is changed, except that the embedded servers are started when no others are set, as for any command.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from consumers.embedded.stack import embedded_home, stack
from consumers.ops.facts import Fact, check, duration, facts_or_error
from consumers.ops.health import Probe, read_side_by_side
from consumers.ops.masking import Mask
from consumers.ops.outbox_health import copy_facts, file_facts, has_outbox, outbox_of_settings
from consumers.ops.redis_health import redis_facts
from consumers.ops.settings_health import DATABASE, REDIS, has_database_driver, rq_facts, setting_facts
from consumers.settings import StoreSettings
from producers.errors import OutboxOutdated, SettingsError
from producers.settings import TransportSettings, read_environment

READ_SECONDS = 8.0
_RECENT_SECONDS = 3 * 86400.0
_SERVER_ADVICE = "check that it runs, and its address, user and password in"

FindFiles = Callable[[], Sequence[Path]]


class Part(NamedTuple):
    name: str
    read: Callable[[], Iterable[Fact]]
    advice: str = ""


def diagnose(old_files: FindFiles) -> list[Fact]:
    """Every fact, in the order of the pipeline's parts; `old_files` finds the JSON files of an old controller.

    Takes at most 8 seconds beside the start of embedded servers.
    """
    try:
        mask = Mask.of(read_environment())
    except SettingsError as error:
        return [Fact("settings", "fail", str(error), "correct the .env in this folder")]
    facts = [*setting_facts(mask)]
    with ExitStack() as servers:
        if all(fact.state == "ok" for fact in facts):
            advice = "correct what it names, or set DATABASE_URL and REDIS_URL to servers of your own"
            facts += facts_or_error("embedded servers", partial(_start_embedded, servers), mask, advice=advice)
        failed = {fact.name for fact in facts if fact.state == "fail"}
        return [*facts, *_read(_parts(failed, old_files, mask), mask)]


def _start_embedded(servers: ExitStack) -> Iterator[Fact]:
    """When nothing is set; they run until `servers` is closed. Raises SettingsError, EmbeddedError."""
    if not StoreSettings.from_environment().is_set and "REDIS_URL" not in read_environment():
        home = embedded_home()
        servers.enter_context(stack(database=True, redis=True))
        yield Fact("embedded servers", "ok", f"started in {home}, stopped again unless another process uses them")


def _parts(failed: set[str], old_files: FindFiles, mask: Mask) -> list[Part]:
    """The parts that can be read with these settings."""
    parts = [
        Part("outbox", partial(_outbox, mask)),
        Part("JSON history", partial(_old_files, old_files)),
        Part("RQ", rq_facts),
    ]
    if REDIS not in failed and "REDIS_URL" in read_environment():
        parts.insert(0, Part("Redis", partial(_redis, mask), f"{_SERVER_ADVICE} REDIS_URL"))
    if DATABASE not in failed and has_database_driver() and StoreSettings.from_environment().is_set:
        advice = f"{_SERVER_ADVICE} DATABASE_URL or the POSTGRES_ variables"
        parts.insert(0, Part("PostgreSQL", partial(_database, mask), advice))
    return parts


def _read(parts: Sequence[Part], mask: Mask) -> Iterator[Fact]:
    """Side by side; a part that takes too long is one failed fact."""

    def reader(part: Part) -> Callable[[], list[Fact]]:
        return lambda: [*facts_or_error(part.name, part.read, mask, advice=part.advice)]

    probes = [Probe(part.name, reader(part)) for part in parts]
    for part, reading in zip(parts, read_side_by_side(probes, READ_SECONDS), strict=True):
        if reading.error is not None:
            advice = "check name resolution, the network, and network file systems"
            yield Fact(part.name, "fail", mask.masked_first_line(reading.error), advice)
        yield from reading.value or ()


def _database(mask: Mask) -> Iterator[Fact]:
    # Not at the top: a controller's host has no database driver.
    from consumers.ops.database_health import database_facts

    return database_facts(StoreSettings.from_environment().url(), mask)


def _redis(mask: Mask) -> Iterator[Fact]:
    return redis_facts(TransportSettings.from_environment(), mask)


def _outbox(mask: Mask) -> Iterator[Fact]:
    settings = TransportSettings.from_environment()
    path = settings.outbox
    if not has_outbox(path):
        yield Fact("outbox", "ok", f"none at {path.absolute()}: nothing was ever recorded here (a worker has none)")
        return
    try:
        health = outbox_of_settings(ask_relay=True)
        yield from health.facts() if health is not None else ()
    except OutboxOutdated as error:
        advice = "start its controller of this release, then run doctor again"
        yield Fact("outbox", "warn", mask.masked_first_line(error), advice)
        return
    except Exception as error:
        advice = "correct what it names, or keep the file for later and set HISTORY_OUTBOX to a new one"
        yield Fact("outbox", "fail", mask.masked_first_line(error), advice)
    yield from facts_or_error("outbox file", lambda: file_facts(path), mask, advice="check the disk")
    yield from facts_or_error("outbox copies", lambda: copy_facts(settings), mask)


def _old_files(find: FindFiles) -> Iterator[Fact]:
    """JSON files that were written in the last three days. Raises OSError."""
    now = time.time()
    ages = {file: now - file.stat().st_mtime for file in find()}
    recent = sorted((age, file) for file, age in ages.items() if age < _RECENT_SECONDS)
    problem = ""
    if recent:
        age, newest = recent[0]
        problem = f"{newest} was written {duration(age)} ago"
        problem += f", {len(recent) - 1} more in the last 3 days" if len(recent) > 1 else ""
    found = f"{len(ages)} files, none written in the last 3 days" if ages else "no files"
    advice = "if an old controller still appends, switch it, then run trading-history import for these files"
    yield check("JSON history", found, problem, advice=advice, state="warn")

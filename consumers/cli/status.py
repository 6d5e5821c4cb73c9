"""The command `status`: the state of the pipeline, its problems and its capacity."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from consumers.cli.options import AsJson
from consumers.cli.pinging import Ping, read_and_ping
from consumers.embedded.stack import stack
from consumers.ops.checks import duration, size
from consumers.process_setup import exit_if_signal_was_lost
from consumers.terminal import json_text, print_json, print_values, values_table

_WATCH_SECONDS = 2.0
_LONG_SECONDS = 365 * 86400.0
_SERVERS = {"database": "database", "redis": "Redis", "outbox": "outbox"}


def status(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat every 2 s until Ctrl-C.")] = False,
    ping: Ping = None,
) -> None:
    """Show row counts, queue, workers, outbox, problems and capacity; exit status 1 if there is a problem.

    Example: trading-history status --watch
    """
    if watch and ping is not None:
        raise typer.BadParameter("cannot be used with --watch: run it from cron", param_hint="--ping")
    if watch:
        with stack(database=True, redis=True):
            _watch(as_json)
    values, is_well = read_and_ping(_read, ping)
    if as_json:
        print_json(values)
    else:
        print_values(status_lines(values))
    raise typer.Exit(0 if is_well else 1)


def _read() -> tuple[dict[str, Any], list[str]]:
    from consumers.ops.status import pipeline_status

    with stack(database=True, redis=True):
        values = pipeline_status()
    return values, values["problems"]


def _watch(as_json: bool) -> None:
    """Show the status every 2 s, for ever: in place on a terminal, otherwise as one block or JSON line each."""
    from consumers.ops.status import pipeline_status

    exit_if_signal_was_lost()
    if as_json or not sys.stdout.isatty():
        while True:
            _print_block(pipeline_status(), as_json)
            time.sleep(_WATCH_SECONDS)
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            values = {"at": time.strftime("%H:%M:%S"), **pipeline_status()}
            live.update(values_table(status_lines(values)), refresh=True)
            time.sleep(_WATCH_SECONDS)


def _print_block(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json_text(values))
    else:
        print_values(status_lines(values))
        print()
    sys.stdout.flush()


def status_lines(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the names and values for a terminal: the state, the problems, an empty line and the capacity."""
    problems = [("problem", problem) for problem in values["problems"]] or [("problems", None)]
    state = [
        # The reason is in the line of the problem.
        (name, "cannot be read" if f"{_SERVERS.get(name)}: {value}" in values["problems"] else value)
        for name, value in values.items()
        if name not in ("problems", "capacity", "approximate")
    ]
    if estimates := values.get("approximate"):
        state.append(("approximate", ", ".join(name.replace("_", " ") for name in estimates)))
    return [*state, *problems, ("", ""), *capacity_lines(values["capacity"])]


def capacity_lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each name of the capacity with its value, always the same names; `-` means unknown or none."""
    not_read = found["not_read"]
    yield "stored rate", _rate(found) or not_read.get("tables", "-")
    waiting, unacknowledged = found["queue_oldest_age_seconds"], found["outbox_oldest_age_seconds"]
    ages = [
        f"{duration(age)} in the {place}"
        for age, place in ((waiting, "queue"), (unacknowledged, "outbox"))
        if age is not None
    ]
    yield "oldest event", ", ".join(ages) or "-"
    yield "outbox size", _outbox(found) or not_read.get("outbox size", "-")
    yield "tables", _parts(found["table_bytes"] or {}) or not_read.get("tables", "-")
    used, most = found["redis_used_bytes"], found["redis_max_bytes"]
    limit = "no limit" if most is None else f"limit {size(most)}"
    yield "Redis memory", not_read.get("Redis memory", "-") if used is None else f"{size(used)}, {limit}"
    yield "Redis keys", _parts(found["redis_key_bytes"] or {}, "about ") or not_read.get("Redis keys", "-")


def _rate(found: Mapping[str, Any]) -> str:
    per_minute, seconds = found["stored_per_minute"], found["stored_rate_seconds"]
    if per_minute is None:
        return ""
    shown = f"{per_minute:,.1f}" if 0 < per_minute < 10 else f"{per_minute:,.0f}"
    return f"{shown} events a minute in the last {duration(seconds)}"


def _outbox(found: Mapping[str, Any]) -> str:
    used, most, growth = (found[f"outbox_{name}"] for name in ("used_bytes", "max_bytes", "growth_bytes_per_second"))
    if used is None:
        return ""
    full = found["outbox_full_in_seconds"]
    if growth is None:
        grows = ""
    elif full is None:
        grows = ", backlog not growing"
    elif full > _LONG_SECONDS:  # such as a few entries that are just on their way
        grows = ", not full within a year"
    else:
        grows = f", full in {duration(full)} at {size(60 * growth)} a minute"
    return f"{size(used)} of {size(most)}{grows}"


def _parts(sizes: Mapping[str, int | None], about: str = "") -> str:
    """Return the sum of the sizes and each one above 0, the largest first. No sum if one is not known."""
    known = {name: count for name, count in sizes.items() if count is not None}
    if not known:
        return ""
    if not any(known.values()) and len(known) == len(sizes):
        return "none"
    listed = [f"{name} {size(count)}" for name, count in sorted(known.items(), key=lambda one: -one[1]) if count]
    listed += [f"{name} unknown" for name, count in sizes.items() if count is None]
    total = [size(sum(known.values()))] if len(known) == len(sizes) else []
    return about + ": ".join([*total, *([", ".join(listed)] if listed else [])])

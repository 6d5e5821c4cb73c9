"""Health checks of the pipeline, and the format of durations and sizes in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from consumers.ops.masking import Mask
from producers.errors import SettingsError
from producers.redis_url import is_forbidden

State = Literal["ok", "warn", "fail", "unknown"]


@dataclass(frozen=True)
class HealthCheck:
    """Result of one check: its state, what was found, and what to do (empty if nothing).

    `fail`: events are lost or cannot be stored. `warn`: a person should look at it. `unknown`: the server answers, but
    this value could not be read.
    """

    name: str
    state: State
    found: str
    advice: str = ""


def check_result(name: str, found: str, problem: str = "", *, advice: str, state: State = "fail") -> HealthCheck:
    """Return a check in `state` if there is a `problem`, otherwise one that is ok with `found`."""
    return HealthCheck(name, state, problem, advice) if problem else HealthCheck(name, "ok", found)


def checks_or_error(
    name: str,
    read: Callable[[], Iterable[HealthCheck]],
    mask: Mask,
    *,
    advice: str = "",
    unknown: tuple[type[Exception], ...] = (),
) -> Iterator[HealthCheck]:
    """Yield the checks of `read`, so that an error in one part does not hide the other parts.

    An error ends the part with a failed check of this name, or an unknown one if its type is in `unknown`. `advice` is
    for errors that do not say themselves what to do.
    """
    try:
        yield from read()
    except unknown as error:
        found = f"cannot be read: {mask.masked_first_line(error)}"
        yield HealthCheck(name, "unknown", found, advice or "run doctor again later")
    except Exception as error:  # a defect too
        yield HealthCheck(name, "fail", mask.masked_first_line(error), _advice_for(error, advice))


def _advice_for(error: Exception, advice: str) -> str:
    if isinstance(error, SettingsError):
        return "correct it in the environment or in .env"
    if is_forbidden(error):
        return "add this rule, or run doctor as one of the users in consumers/deploy/redis-users.acl that are for it"
    return advice or "if no other line explains this, report it as a bug"


def problems_of(checks: Iterable[HealthCheck], strict: str) -> Iterator[str]:
    """Yield what each failed check has found, and the check named `strict` unless it is ok."""
    for one in checks:
        if one.state == "fail" or (one.name == strict and one.state != "ok"):
            yield f"{one.name}: {one.found}"


def duration(seconds: float) -> str:
    """Return a duration as text, such as `8 s`, `12 min`, `5 h` or `3 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    if minutes < 120:
        return f"{minutes} min"
    return f"{hours} h" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def counted(count: int, what: str) -> str:
    """Return a number with its noun, such as `1 event` or `2 events`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Return a number of bytes as text: in KiB below 1 MiB, in MiB below 1 GiB, in GiB above."""
    if count < 2**20:
        return f"{count / 2**10:,.1f} KiB"
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"

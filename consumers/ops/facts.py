"""One fact about the pipeline, how facts are read when some of them cannot be, and how their numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from consumers.ops.masking import Mask

State = Literal["ok", "warn", "fail", "unknown"]


@dataclass(frozen=True)
class Fact:
    """One fact: its state, the finding, and an advice (empty if there is nothing to do).

    `fail` loses events or keeps them from being stored, `warn` needs a person's attention, `unknown` could not be read
    from a server that answers otherwise.
    """

    name: str
    state: State
    found: str
    advice: str = ""


def check(name: str, found: str, problem: str = "", *, advice: str, state: State = "fail") -> Fact:
    """A fact that is ok with `found`; if there is a `problem`, a fact in this `state` with the problem."""
    return Fact(name, state, problem, advice) if problem else Fact(name, "ok", found)


def facts_or_error(
    name: str,
    read: Callable[[], Iterable[Fact]],
    mask: Mask,
    *,
    advice: str = "",
    unknown: tuple[type[Exception], ...] = (),
) -> Iterator[Fact]:
    """The facts of `read`. An error adds a failed fact of this name, or an unknown one if it is in `unknown`."""
    try:
        yield from read()
    except unknown as error:
        found = f"cannot be read: {mask.masked_first_line(error)}"
        yield Fact(name, "unknown", found, advice or "run doctor again later")
    except Exception as error:  # a defect in one fact must not hide the others
        yield Fact(name, "fail", mask.masked_first_line(error), advice or "if no other line explains it, report it")


def duration(seconds: float) -> str:
    """In the two largest units that matter: `3 d 4 h`, `12 min`, `8 s`."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    if minutes < 120:
        return f"{minutes} min"
    return f"{hours} h" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """A number of bytes, in MiB below one GiB and in GiB above."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"

"""One finding of the doctor, and how a look is taken that may fail or hang without harm to the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Literal

from consumers.ops.doctor.masking import Mask

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What was looked at, how it stands, what was found there, and what to do (empty when there is nothing to do)."""

    name: str
    status: Status
    found: str
    advice: str = ""


Look = Callable[[], Iterable[Check]]


def looked(
    name: str, look: Look, mask: Mask, *, advice: str = "", unseen: tuple[type[Exception], ...] = ()
) -> Iterator[Check]:
    """The checks of one look; an error ends it with a failed check of this name, or a warning for those in `unseen`."""
    try:
        yield from look()
    except unseen as error:
        yield Check(name, "warn", f"cannot be seen: {mask.told(error)}", advice or "look again later")
    except Exception as error:  # a defect in one look must not hide what the others find
        yield Check(name, "fail", mask.told(error), advice or "if no other line explains it, report it")


def side_by_side(groups: Mapping[str, Look], mask: Mask, seconds: float) -> list[Check]:
    """The checks of all groups, in their order, each group in a thread of its own.

    A group that has not ended after `seconds` is left behind, with what it found so far and a failed check of its name.
    """
    found: dict[str, list[Check]] = {name: [] for name in groups}
    # Daemons: name resolution and a dead network file system know no time limit, and must not keep the program.
    threads = {
        name: threading.Thread(target=_collect, args=(looked(name, look, mask), found[name]), daemon=True)
        for name, look in groups.items()
    }
    for thread in threads.values():
        thread.start()
    deadline = monotonic() + seconds
    checks: list[Check] = []
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - monotonic()))
        late = thread.is_alive()
        checks += list(found[name])
        if late:
            told = f"no answer within {seconds:.0f} s; what is not listed was not looked at"
            checks.append(Check(name, "fail", told, "look at name resolution, the network, and file systems on it"))
    return checks


def _collect(checks: Iterable[Check], into: list[Check]) -> None:
    for check in checks:
        into.append(check)  # noqa: PERF402  # one by one: another thread may take what is there


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

"""The packages that this program was made for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from consumers.ops.doctor.checks import Check

_US = "trading-history"
_ADVICE = "pip install -U '{}'"


def has_database_driver() -> bool:
    """Whether the extra [worker] is installed, which a controller does without."""
    return find_spec("sqlalchemy") is not None and find_spec("psycopg2") is not None


def rq_version() -> Iterator[Check]:
    """HistoryWorker refuses to start outside this range."""
    wanted = next((one for one in _requirements() if one.name == "rq"), None)
    found = metadata.version("rq")
    if wanted is None:
        yield Check("RQ", "warn", f"{found}; what it was tested with is not known here", _ADVICE.format(_US))
    elif wanted.specifier.contains(found, prereleases=True):
        yield Check("RQ", "ok", f"{found} (tested with {wanted.specifier})")
    else:
        yield Check(
            "RQ",
            "fail",
            f"{found}, but tested with {wanted.specifier}: HistoryWorker does not start",
            f"{_ADVICE.format(wanted)}, or use RQ's own worker",
        )


def packages() -> Iterator[Check]:
    """What the distribution asks for, [worker] included where it is installed, and the version of Python."""
    requirements = _requirements()
    if not requirements:
        yield Check("packages", "warn", f"{_US} is not installed, only imported", "pip install it")
        return
    wrong = [f"{one} (found {_version(one.name) or 'none'})" for one in requirements if not _satisfied(one)]
    python = SpecifierSet(metadata.metadata(_US)["Requires-Python"])
    if not python.contains(platform.python_version(), prereleases=True):
        wrong.append(f"Python {python} (found {platform.python_version()})")
    if wrong:
        extras = "[worker]" if has_database_driver() else ""
        yield Check("packages", "fail", f"wanted: {', '.join(wrong)}", _ADVICE.format(_US + extras))
    else:
        kind = "with" if has_database_driver() else "without"
        found = f"{_US} {metadata.version(_US)} {kind} a database driver, Python {platform.python_version()}"
        yield Check("packages", "ok", found)


def _requirements() -> list[Requirement]:
    try:
        lines = metadata.requires(_US) or []
    except metadata.PackageNotFoundError:
        return []
    extra = "worker" if has_database_driver() else ""
    wanted = (Requirement(line) for line in lines)
    return [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": extra})]


def _satisfied(wanted: Requirement) -> bool:
    found = _version(wanted.name)
    return found is not None and wanted.specifier.contains(found, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

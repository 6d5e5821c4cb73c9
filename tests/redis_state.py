"""The content of Redis as one flat dict, in which times are phases of a run; the differences of two such dicts."""

from __future__ import annotations

import re
import time
import zlib
from base64 import b64decode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

from redis import Redis
from rq.utils import as_text

# A place: a Redis key and one of its fields, or another pair of names by which two runs are compared.
Place = tuple[str, str]
State = dict[Place, str]

TYPE, EXPIRES = "(type)", "(expires)"
# Known lifetimes in seconds: of dead workers, results, RQ's lock, acknowledgements and failures, then those that a test
# chooses.
_LIFETIMES = (60, 500, 599, 604_800, 31_536_000, 700, 900, 3600)
_UTC_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_ACKNOWLEDGED = re.compile(r"^\d{10} (?=[0-9a-f-]+ \w+:)")
_TIMESTAMP = re.compile(r"\d{10}\.\d+")


class Phases:
    """The named parts of one run, in their order. A time is replaced by the name of the part that it falls in."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, int, int]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the time of the block as the phase `name`."""
        time.sleep(0.003)  # so that no millisecond belongs to two phases
        began = int(time.time() * 1000)
        yield
        self._spans.append((name, began, int(time.time() * 1000)))

    @property
    def seconds(self) -> float:
        """The seconds from the first phase to the last."""
        return (self._spans[-1][2] - self._spans[0][1]) / 1000

    def of(self, at: float) -> str:
        """Return the phase of a time, which is in milliseconds."""
        for name, began, ended in self._spans:
            if began <= int(at) <= ended:
                return name
        return f"at {datetime.fromtimestamp(at / 1000, UTC)}"

    def expiry(self, at: int) -> str:
        """Return the phase and the lifetime that make an expiry, which is in milliseconds; negative means never."""
        if at < 0:
            return "never"
        for lifetime in _LIFETIMES:
            phase = self.of(at - lifetime * 1000)
            if not phase.startswith("at "):
                return f"{phase} + {lifetime} s"
        return self.of(at)

    def score(self, score: float) -> str:
        """Return one of RQ's scores. It has whole seconds, which are too coarse to name the phase."""
        if score < 0 or score == float("inf"):
            return str(score)
        began, ended = self._spans[0][1] // 1000, self._spans[-1][2] // 1000
        for lifetime in _LIFETIMES:
            if began <= score - lifetime <= ended:
                return f"during the run + {lifetime} s"
        return self.of(score * 1000)

    def text(self, text: str) -> str:
        """Return the phase if a text is a time, else the text."""
        if _UTC_TIME.fullmatch(text):
            return self.of(datetime.fromisoformat(text).timestamp() * 1000)
        return self.of(float(text) * 1000) if _TIMESTAMP.fullmatch(text) else text


def state_of(redis: Redis, phases: Phases) -> State:
    """Return each key with its type, its expiry and each of its fields, members or entries."""
    state: State = {}
    for name in sorted(redis.keys("*")):
        key = as_text(name)
        kind = as_text(redis.type(key))
        state[key, TYPE] = kind
        state[key, EXPIRES] = phases.expiry(redis.pexpiretime(key))
        for field, value in _FIELDS[kind](redis, key, phases):
            state[key, field] = value
    return state


def error_fields(prefix: str, text: str) -> dict[str, str]:
    """Return the form of an error text (traceback or lines), and its last line without the module's name."""
    lines = text.strip().splitlines() or [""]
    form = "traceback" if lines[0].startswith("Traceback (") else f"{len(lines)} line"
    return {f"{prefix} form": form, f"{prefix} error": re.sub(r"^[\w.]+\.(?=\w+: )", "", lines[-1])}


def _hash(redis: Redis, key: str, phases: Phases) -> Iterator[tuple[str, str]]:
    found: Any = redis.hgetall(key)
    for field, value in found.items():
        yield from _decoded(as_text(field), value, phases)


def _list(redis: Redis, key: str, phases: Phases) -> Iterator[tuple[str, str]]:
    for position, value in enumerate(redis.lrange(key, 0, -1)):
        yield str(position), as_text(value)


def _set(redis: Redis, key: str, phases: Phases) -> Iterator[tuple[str, str]]:
    for member in redis.smembers(key):
        yield as_text(member), "a member"


def _sorted_set(redis: Redis, key: str, phases: Phases) -> Iterator[tuple[str, str]]:
    scored: Any = redis.zrange(key, 0, -1, withscores=True)
    for member, score in scored:
        yield as_text(member), phases.score(score)


def _stream(redis: Redis, key: str, phases: Phases) -> Iterator[tuple[str, str]]:
    entries: Any = redis.xrange(key)
    for position, (entry_id, values) in enumerate(entries):
        yield f"{position} id", phases.of(int(entry_id.split(b"-")[0]))
        for field, value in values.items():
            yield from ((f"{position} {name}", text) for name, text in _decoded(as_text(field), value, phases))


def _string(redis: Redis, key: str, phases: Phases) -> Iterator[tuple[str, str]]:
    yield "(value)", as_text(redis.get(key) or b"")


_FIELDS = {"hash": _hash, "list": _list, "set": _set, "zset": _sorted_set, "stream": _stream, "string": _string}


def _decoded(field: str, value: bytes, phases: Phases) -> Iterable[tuple[str, str]]:
    """Return one field of a hash or a stream, decoded; an error text becomes two fields."""
    if field in ("exc_info", "exc_string"):
        compressed = b64decode(value) if field == "exc_string" else value
        return error_fields(field, zlib.decompress(compressed).decode()).items()
    if field == "data":
        text = zlib.decompress(value).decode()
    elif field == "return_value":
        text = b64decode(value).decode()
    else:
        text = _ACKNOWLEDGED.sub("", phases.text(value.decode()))
    if field == "total_working_time" and 0 < float(text) <= phases.seconds:
        text = "within the run"
    elif field == "execution_id":
        text = re.sub("^[0-9a-f]{32}$", "an id", text)
    elif field == "ip_address":
        text = re.sub(r":\d+$", ":a port", text)
    return [(field, text)]


@dataclass(frozen=True)
class Difference:
    """An expected difference and its reason. Key and field may be shell patterns; None is an absent field."""

    key: str
    field: str
    rq: str | None
    ours: str | None
    reason: str

    def covers(self, place: Place) -> bool:
        """Return whether key and field of a place match."""
        return fnmatchcase(place[0], self.key) and fnmatchcase(place[1], self.field)


def unexpected(rq: State, ours: State, allowed: Sequence[Difference]) -> dict[Place, Any]:
    """Return each place with a difference that is not allowed, as (RQ's, ours), and each unused allowed difference.

    A place that an allowed difference covers must differ, and exactly in this way.
    """
    found: dict[Place, Any] = {}
    met: set[Difference] = set()
    for place in sorted(rq.keys() | ours.keys()):
        pair = (rq.get(place), ours.get(place))
        expected = next((difference for difference in allowed if difference.covers(place)), None)
        if expected is not None:
            met.add(expected)
        if pair != ((pair[0], pair[0]) if expected is None else (expected.rq, expected.ours)):
            found[place] = pair
    unneeded = {(one.key, one.field): f"does not occur: {one.reason}" for one in allowed if one not in met}
    return found | unneeded

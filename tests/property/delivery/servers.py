"""The two servers of the machine: reading all that they hold, and losing some of it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import psycopg2
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from producers.redis_keys import acknowledgement_key, reserved_key
from tests.faults.accepted import content_of

QUEUE = "history"
_TABLES = ("portfolio_history", "signal_archives", "event_outcomes", "withdrawals")
_HISTORY = _TABLES[:2]
_NUMBERED = (*_HISTORY, "withdrawals")

_READ = f"""
SELECT json_build_object({", ".join(f"'{one}', (SELECT coalesce(json_agg(t), '[]') FROM {one} t)" for one in _TABLES)},
    {", ".join(f"'{one}_last', (SELECT last_value FROM {one}_id_seq)" for one in _NUMBERED)})::text
"""  # constants
_CLEAR = ";".join(
    [
        *(f"DELETE FROM {one}" for one in _TABLES),  # faster than TRUNCATE for a few rows
        *(f"SELECT setval('{one}_id_seq', 100, false)" for one in _NUMBERED),
    ]
)
_PUT_BACK = ";".join(
    [
        *(
            f"INSERT INTO {one} SELECT * FROM json_populate_recordset(NULL::{one}, %(text)s::json->'{one}')"
            for one in _TABLES
        ),
        *(f"SELECT setval('{one}_id_seq', (%(text)s::json->>'{one}_last')::bigint)" for one in _NUMBERED),
    ]
)  # constants

# All that Redis holds, but the jobs: lists and sorted sets as arrays, acknowledgements as fields and values.
_READ_KEYS = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
    local kind = redis.call('TYPE', key).ok
    if kind == 'list' then found[#found + 1] = {key, redis.call('LRANGE', key, 0, -1)}
    elseif kind == 'zset' then found[#found + 1] = {key, redis.call('ZRANGE', key, 0, -1)}
    elseif kind == 'hash' and string.sub(key, 1, #ARGV[1]) == ARGV[1] then
        found[#found + 1] = {key, redis.call('HGETALL', key)}
    end
end
return found
"""


class Row(NamedTuple):
    """A row of history, as it is or as it was until its withdrawal; `table` is "" then."""

    table: str
    row_id: int
    event_id: str
    source: str
    sequence: int | None
    content: str


class Outcome(NamedTuple):
    outcome: str
    reason: str | None


@dataclass(frozen=True)
class Stored:
    """Content of the database; `text` puts it back. `withdrawn` has rows as they were."""

    rows: list[Row]
    outcomes: dict[str, Outcome]
    withdrawn: list[Row]
    text: str


@dataclass
class Queued:
    """Where Redis has jobs: in lists that workers take them from or hold, in the failed registry, acknowledged."""

    waiting: list[str] = field(default_factory=list)
    reserved: dict[str, list[str]] = field(default_factory=dict)  # by key of the list
    started: list[str] = field(default_factory=list)  # by stock workers
    failed: list[str] = field(default_factory=list)
    acknowledged: dict[str, str] = field(default_factory=dict)  # text by job id

    def active(self, *, without: Collection[str] = ()) -> list[str]:
        """Return the ids in all lists of jobs that run now or later, `without` some reserved lists.

        An id occurs once for each list.
        """
        reserved = [job for key, jobs in self.reserved.items() if key not in without for job in jobs]
        return [*self.waiting, *reserved, *self.started]


class Database:
    """The tables, through a separate connection."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg2.connect(url)
        self._connection.autocommit = True
        self._cursor = self._connection.cursor()
        # Commits do not wait for the disk: servers are not killed here.
        self._cursor.execute(f"ALTER DATABASE {self._connection.info.dbname} SET synchronous_commit = off")
        self._cursor.execute("SET TimeZone = 'UTC'; SET synchronous_commit = off")

    def clear(self) -> None:
        self._cursor.execute(_CLEAR)

    def read(self) -> Stored:
        self._cursor.execute(_READ)
        row = self._cursor.fetchone()
        assert row is not None  # a SELECT without FROM
        (text,) = row
        found = json.loads(text, parse_float=Decimal)
        rows = [_row(table, one) for table in _HISTORY for one in found[table]]
        withdrawn = [_row("", one | one["content"] | {"id": one["row_id"]}) for one in found["withdrawals"]]
        outcomes = {one["job_id"]: Outcome(one["outcome"], one["reason"]) for one in found["event_outcomes"]}
        return Stored(rows, outcomes, withdrawn, text)

    def put_back(self, then: Stored) -> None:
        """Make the tables as they were `then`, ids of rows included: the last commits are lost."""
        self._cursor.execute(f"BEGIN; {_CLEAR}; {_PUT_BACK}; COMMIT", {"text": then.text})

    def close(self) -> None:
        self._connection.close()


def _row(table: str, one: dict[str, Any]) -> Row:
    content = content_of(one | {"signals": one.get("signals_data")})
    return Row(table, one["id"], str(UUID(one["event_id"])), one["source"], one["sequence"], content)


class RedisContents:
    """The keys of Redis, through a separate client."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.queue = Queue(QUEUE, connection=redis, serializer=JSONSerializer)

    def read(self) -> Queued:
        found: Any = self._redis.eval(_READ_KEYS, 0, acknowledgement_key(""))
        queued, queue = Queued(), self.queue
        for key, values in ((key.decode(), [value.decode() for value in values]) for key, values in found):
            if key == queue.key:
                queued.waiting = values
            elif key.startswith(reserved_key(QUEUE, "")):
                queued.reserved[key] = values
            elif key in (queue.started_job_registry.key, queue.intermediate_queue_key):
                queued.started += [value.split(":")[0] for value in values]
            elif key == queue.failed_job_registry.key:
                queued.failed = values
            elif key.startswith(acknowledgement_key("")):
                queued.acknowledged |= zip(values[::2], values[1::2], strict=True)
        return queued

    def keys(self) -> list[bytes]:
        found: Any = self._redis.keys()
        return sorted(found)

    def copy(self) -> list[tuple[bytes, int, bytes]]:
        """Return all keys, for a replica that lags from now on."""
        keys = self.keys()
        with self._redis.pipeline() as pipe:
            for key in keys:
                pipe.pttl(key)
                pipe.dump(key)
            found = pipe.execute()
        return [(key, max(ttl, 0), value) for key, ttl, value in zip(keys, found[::2], found[1::2], strict=True)]

    def put_back(self, then: list[tuple[bytes, int, bytes]]) -> None:
        """Replace all keys by those of a replica."""
        with self._redis.pipeline() as pipe:
            pipe.flushall()
            for key, ttl, value in then:
                pipe.restore(key, ttl, value)
            pipe.execute()

"""Clocks of a machine, which a test moves, and random numbers that are the same in each run."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from redis import Redis

from producers import outbox_clock
from producers.redis_keys import acknowledgement_key, orphans_key
from tests.property.delivery.servers import QUEUE

_RUNNING = (time.CLOCK_MONOTONIC, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

# Redis' clock cannot be set. Make each time that Redis has stored older, and each expiry nearer.
_AGE = """
local seconds = tonumber(ARGV[1])
for _, key in ipairs(redis.call('KEYS', '*')) do
    local kind, ttl = redis.call('TYPE', key).ok, redis.call('PTTL', key)
    if ttl >= 0 and ttl <= seconds * 1000 then
        redis.call('DEL', key)
    else
        if ttl >= 0 then redis.call('PEXPIRE', key, ttl - seconds * 1000) end
        if kind == 'zset' then
            local members = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
            for n = 1, #members, 2 do
                if tonumber(members[n + 1]) > 0 then redis.call('ZINCRBY', key, -seconds, members[n]) end
            end
        elseif kind == 'hash' and string.sub(key, 1, #ARGV[2]) == ARGV[2] then
            local found = redis.call('HGETALL', key)
            for n = 1, #found, 2 do
                local at, rest = string.match(found[n + 1], '^(%d+)(.*)$')
                redis.call('HSET', key, found[n], string.format('%d', at - seconds) .. rest)
            end
        elseif key == ARGV[3] then
            for _, job in ipairs(redis.call('HKEYS', key)) do redis.call('HINCRBY', key, job, -seconds) end
        end
    end
end
"""


class Clock:
    """Clocks of this process while `installed`. They stand still, but for a microsecond each time they are read."""

    def __init__(self) -> None:
        self._started = {clock: time.clock_gettime(clock) for clock in (time.CLOCK_REALTIME, *_RUNNING)}
        self._passed = self._wrong = 0.0
        self._boot = 0
        self._random = random.Random(0)

    def reset(self) -> None:
        self._wrong = 0.0
        self._random.seed(0)

    def pass_time(self, seconds: int, redis: Redis) -> None:
        """Let time pass, for this machine and for Redis."""
        self._passed += seconds
        redis.eval(_AGE, 0, seconds, acknowledgement_key(""), orphans_key(QUEUE))

    def set_wall_clock(self, wrong: float) -> None:
        """Set the wall clock `wrong` seconds ahead of the right time."""
        self._wrong = wrong

    def restart(self) -> None:
        """Restart the machine; no time passes."""
        self._boot += 1

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Show these clocks and random numbers to this process; `datetime.now` and the servers keep the real time."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: self._now(time.CLOCK_REALTIME) + self._wrong)
            patch.setattr(time, "monotonic", lambda: self._now(time.CLOCK_MONOTONIC))
            patch.setattr(time, "clock_gettime", self._now)
            patch.setattr(outbox_clock, "boot_id", lambda: f"boot {self._boot}")
            patch.setattr(os, "urandom", self._random.randbytes)  # also for UUIDs
            patch.setattr(secrets, "token_hex", lambda size=32: self._random.randbytes(size).hex())
            patch.setattr(secrets, "randbits", self._random.getrandbits)
            # SystemRandom has its own name for os.urandom. The relay chooses the times of its checks with it.
            patch.setattr(random.SystemRandom, "random", lambda _: self._random.random())
            yield

    def _now(self, clock: int) -> float:
        self._passed += 1e-6
        return self._started[clock] + self._passed

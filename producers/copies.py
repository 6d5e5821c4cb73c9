"""Distinguishes two copies of an outbox: a copied folder, a cloned machine, a restored backup.

Each outbox has a random token, which is also in Redis, once for each current source of the outbox. A relay that takes
its lock replaces the token in both places, and again every minute. Of two copies, only one finds its own token in
Redis; the other one takes new sources for new events. Its earlier entries keep their source and number: a nonce
distinguishes their deliveries.
"""

from __future__ import annotations

import logging
import secrets
import time

from redis import Redis, WatchError
from redis.client import Pipeline

from producers.acknowledgements import shown
from producers.outbox import Outbox
from producers.redis_keys import token_key

logger = logging.getLogger(__name__)

# The token of a source that is not used for this long expires. A missing token is accepted.
_TOKEN_TTL_SECONDS = 30 * 24 * 3600
_CHECK_SECONDS = 5.0
_EXCHANGE_SECONDS = 60.0  # a restored backup that is younger may not be detected
_TRIES = 5


class CopyGuard:
    """Detects, for the relay of one outbox, that another copy of the outbox is in use.

    Raises:
        RedisError: from every method, when Redis cannot be reached; the sources are unchanged.
        OutboxError: from every method, when the outbox cannot be read or written.
    """

    def __init__(self, outbox: Outbox, redis: Redis) -> None:
        self._outbox = outbox
        self._redis = redis
        self._known: set[str] = set()  # sources whose token this relay has put into Redis since it took its lock
        self._check_at = self._exchange_at = 0.0

    def begin(self) -> None:
        """Make the next check exchange the token. Call this when the relay has just taken its lock."""
        self._known = set()

    def check(self) -> None:
        """Exchange the token after `begin` and every minute; compare it every few seconds with the one in Redis."""
        sources = [source.full_name for source in self._outbox.sources() if source.current]
        if not self._known.issuperset(sources) or (sources and time.monotonic() >= self._exchange_at):
            if not self._exchange(sources):
                return
            self._known = set(sources)
            self._exchange_at = time.monotonic() + _EXCHANGE_SECONDS
        elif sources and time.monotonic() >= self._check_at:
            self._compare(sources)
        else:
            return
        self._check_at = time.monotonic() + _CHECK_SECONDS

    def _exchange(self, sources: list[str]) -> bool:
        """Put a new token into Redis, or replace the sources if another copy has put its own token there.

        Return False if others changed the token at every try. That happens when a relay was stopped, another one took
        over, and both now exchange the token of the same outbox.
        """
        keys = [token_key(source) for source in sources]
        token = secrets.token_hex(8)
        for _ in range(_TRIES):
            with self._redis.pipeline() as pipe:
                pipe.watch(*keys)  # type: ignore[no-untyped-call]  # redis-py annotates it only in part
                found = {shown(token) for token in pipe.mget(keys) if token is not None}
                is_own = found <= self._outbox.header.read().tokens
                if is_own:  # stored first: if this process dies, Redis has its present token or this one
                    self._outbox.header.begin_exchange(found, token)
                pipe.multi()
                if is_own:
                    _set_tokens(pipe, keys, token)
                try:
                    pipe.execute()  # also without a command, EXEC fails if a token changed since it was read
                except WatchError:  # another copy or relay was faster: the next try finds its token
                    continue
                if is_own:
                    self._outbox.header.end_exchange(token)
                else:
                    self._replace_sources(sources)
                return True
        return False

    def _compare(self, sources: list[str]) -> None:
        keys = [token_key(source) for source in sources]
        token = self._outbox.header.read().token
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.mget(keys)
            for key in keys:
                pipe.set(key, token, nx=True)  # in case Redis has lost it
                pipe.expire(key, _TOKEN_TTL_SECONDS)
            found = pipe.execute()[0]
        if any(one is not None and shown(one) != token for one in found):
            self._exchange(sources)

    def _replace_sources(self, sources: list[str]) -> None:
        replaced = self._outbox.header.replace_sources(sources)
        if replaced:  # another process may have replaced them meanwhile
            logger.warning(
                "outbox %s was copied or restored, and another copy has used it. New events get a new source instead of"
                " %s. No event is lost. Run `trading-history audit` on the host of each copy",
                self._outbox.path,
                ", ".join(replaced),
            )


def _set_tokens(pipe: Pipeline, keys: list[str], token: str) -> None:
    for key in keys:
        pipe.set(key, token, ex=_TOKEN_TTL_SECONDS)

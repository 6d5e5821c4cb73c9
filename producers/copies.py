"""Tells two copies of an outbox apart: a copied folder, a cloned machine, a restored backup.

Each outbox has a random token, which stands in Redis as well, beside each of its current sources. A relay that takes
its lock replaces both. Of two copies only one finds its own token there; the other one takes new sources for what it
records from then on. What it has recorded keeps its source and number: its deliveries have a nonce of their own.
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

# The token of a source that is not used for this long expires: a missing token is accepted.
_TOKEN_TTL_SECONDS = 30 * 24 * 3600
_CHECK_SECONDS = 5.0
_TRIES = 5


class CopyGuard:
    """Watches over the sources of one outbox, for its relay.

    Raises:
        RedisError: from every method, when Redis cannot be reached; sources stay as they are.
        OutboxError: from every method, when the outbox cannot be read or written.
    """

    def __init__(self, outbox: Outbox, redis: Redis) -> None:
        self._outbox = outbox
        self._redis = redis
        self._known: set[str] = set()  # sources whose token stands in Redis, since this relay has its lock
        self._check_at = 0.0

    def begin(self) -> None:
        """The relay has just taken its lock: the next check exchanges the token."""
        self._known = set()

    def check(self) -> None:
        """Exchange the token when that is due; in between look whether another copy has done so."""
        sources = [source.full_name for source in self._outbox.sources() if source.current]
        if not self._known.issuperset(sources):
            if not self._exchange(sources):
                return
            self._known = set(sources)
        elif sources and time.monotonic() >= self._check_at:
            self._compare(sources)
        else:
            return
        self._check_at = time.monotonic() + _CHECK_SECONDS

    def _exchange(self, sources: list[str]) -> bool:
        """Put a new token there, or leave the sources when another copy has done so; False when it could not be told.

        A relay that was stopped may go on while another one has taken over and exchanges the token of the same outbox.
        """
        keys = [token_key(source) for source in sources]
        for _ in range(_TRIES):
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.watch(*keys)  # type: ignore[no-untyped-call]  # redis-py annotates it by half
                found = {shown(token) for token in pipe.mget(keys) if token is not None}
                identity = self._outbox.identity.read()
                is_own = found <= {identity.token, identity.next_token}
                token = secrets.token_hex(8)
                # Redis may answer and this process die before it hears: the outbox keeps both until then.
                before = found.pop() if found and is_own else identity.token
                if is_own and not self._outbox.identity.begin_exchange(identity, before, token):
                    continue
                pipe.multi()
                if is_own:
                    _set_tokens(pipe, keys, token)
                else:
                    pipe.exists(*keys)  # whether Redis still had what was found when the outbox was read
                try:
                    pipe.execute()
                except WatchError:  # another copy, or another relay, in this moment: the next try finds its token
                    continue
                if is_own:
                    self._outbox.identity.end_exchange(token)
                else:
                    self._leave("copied")
                return True
        return False

    def _compare(self, sources: list[str]) -> None:
        keys = [token_key(source) for source in sources]
        token = self._outbox.identity.read().token
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.mget(keys)
            for key in keys:
                pipe.set(key, token, nx=True)  # Redis has lost it
                pipe.expire(key, _TOKEN_TTL_SECONDS)
            found = pipe.execute()[0]
        if any(one is not None and shown(one) != token for one in found):
            self._exchange(sources)

    def _leave(self, because: str) -> None:
        left = self._outbox.identity.leave_sources(because)
        if left:
            logger.warning(
                "outbox %s was copied or restored, and another copy has used it: what is recorded from now on has a new"
                " source instead of %s. No event is lost by that; `trading-history audit` tells more",
                self._outbox.path,
                ", ".join(left),
            )


def _set_tokens(pipe: Pipeline, keys: list[str], token: str) -> None:
    for key in keys:
        pipe.set(key, token, ex=_TOKEN_TTL_SECONDS)

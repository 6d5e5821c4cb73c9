"""Makes JSON the only serializer of the process: it never unpickles anything from Redis."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import rq.serializers
from rq.serializers import JSONSerializer


class Unreadable(str):
    """Text that replaces a value that is not JSON. It unpacks into the four values of an RQ job's call.

    `stored` is the value in Redis. RQ writes it back when it requeues the job.
    """

    stored: bytes

    def __iter__(self) -> Iterator[Any]:
        return iter((str(self), None, [], {}))  # function, instance, args, kwargs


class JsonOnly:
    """RQ's JSON serializer, except that `loads` never raises: one pickled job would break the page of its list."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        return value.stored if isinstance(value, Unreadable) else JSONSerializer.dumps(value)

    @staticmethod
    def loads(stored: bytes) -> Any:
        try:
            return JSONSerializer.loads(stored)
        except (ValueError, RecursionError):
            unreadable = Unreadable(f"({len(stored):,} bytes that are not JSON)")
            unreadable.stored = stored
            return unreadable


def forbid_pickle() -> None:
    """Make RQ read and write JSON for the rest of this process, whatever serializer it is asked for.

    Call it before rq_dashboard is imported. Afterwards, unpickling a class or a function raises RuntimeError.
    """
    # RQ's registries and workers use the default, even if their queue has another serializer.
    rq.serializers.DefaultSerializer = JsonOnly  # type: ignore[misc, assignment]  # replaced on purpose
    rq.serializers.PickleSerializer = JsonOnly  # type: ignore[assignment]  # likewise
    rq.serializers.SERIALIZER_ALIASES.update(json=JsonOnly, pickle=JsonOnly)
    sys.addaudithook(_refuse_pickle)


def _refuse_pickle(event: str, _: tuple[Any, ...]) -> None:  # pragma: no cover - Python does not trace audit hooks
    # The interpreter raises this event before any unpickler looks up a class or a function.
    if event == "pickle.find_class":
        raise RuntimeError("pickle is disabled in this process")

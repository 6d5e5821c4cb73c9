"""Makes JSON the only serializer of this process: nothing in Redis is ever unpickled in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import rq.serializers
from rq.serializers import JSONSerializer


class Unreadable(str):
    """Text in place of a value that is not JSON. It unpacks into the four values of RQ's call.

    `stored` is the value in Redis: RQ writes it back when it requeues the job.
    """

    stored: bytes

    def __iter__(self) -> Iterator[Any]:
        return iter((str(self), None, [], {}))  # function, instance, args, kwargs


class JsonOnly:
    """RQ's JSON serializer, but reading never raises: one job of another program would break the page of a list."""

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
    """For the rest of this process, before rq_dashboard is imported: RQ reads and writes JSON whatever it is asked for.

    Unpickling anything that names code raises RuntimeError.
    """
    # RQ's registries and workers take its default, whatever their queue's serializer is.
    rq.serializers.DefaultSerializer = JsonOnly  # type: ignore[misc, assignment]  # on purpose
    rq.serializers.PickleSerializer = JsonOnly  # type: ignore[assignment]  # likewise
    rq.serializers.SERIALIZER_ALIASES.update(json=JsonOnly, pickle=JsonOnly)
    sys.addaudithook(_refuse_pickle)


def _refuse_pickle(event: str, _: tuple[Any, ...]) -> None:
    # Raised by the interpreter before a pickle gets hold of a class or a function, whoever loads it.
    if event == "pickle.find_class":
        raise RuntimeError("nothing is unpickled in this process")

"""Makes JSON the only serializer of this process: nothing that stands in Redis is ever unpickled in it."""

from __future__ import annotations

import sys
from typing import Any

import rq.serializers


def forbid_pickle() -> None:
    """For the rest of this process. RQ reads and writes JSON; loading a pickle that names any code raises."""
    # RQ's registries and workers take its default whatever their queue's serializer is.
    rq.serializers.DefaultSerializer = rq.serializers.JSONSerializer  # type: ignore[misc, assignment]  # on purpose
    rq.serializers.PickleSerializer = rq.serializers.JSONSerializer  # type: ignore[assignment]  # likewise
    rq.serializers.SERIALIZER_ALIASES["pickle"] = rq.serializers.JSONSerializer
    sys.addaudithook(_refuse_pickle)


def _refuse_pickle(event: str, _: tuple[Any, ...]) -> None:
    # Raised by the interpreter before a pickle gets hold of a class or a function, whoever loads it.
    if event == "pickle.find_class":
        raise RuntimeError("nothing is unpickled in this process")

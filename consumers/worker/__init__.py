"""HistoryWorker and its parts: threads, reservations, batch processing, completion, maintenance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consumers.worker.history_worker import HistoryWorker

__all__ = ["HistoryWorker"]


def __getattr__(name: str) -> Any:
    # Imported on demand: a stock worker imports consumers.handlers in each fork and needs only the batch processing.
    if name == "HistoryWorker":
        from consumers.worker.history_worker import HistoryWorker

        return HistoryWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

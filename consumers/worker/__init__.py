"""HistoryWorker and its parts: threads, reservations, batch processing, completion, maintenance."""

from consumers.worker.history_worker import HistoryWorker

__all__ = ["HistoryWorker"]

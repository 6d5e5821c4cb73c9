"""Names in Redis beside RQ's own. A producer's relay reads the first three; the others are the workers'."""

from __future__ import annotations


def acknowledgement_key(source: str) -> str:
    """Hash of sequence → outcome, written by workers and emptied by the relay of that source."""
    return f"history:ack:{source}"


def holders_key(queue: str) -> str:
    """Hash of the names of those that may hold jobs of a queue → `accused` while one holds a suspect, alone."""
    return f"history:holders:{queue}"


def held_key(queue: str, worker: str) -> str:
    """List of the ids of the jobs that a worker holds."""
    return f"history:held:{queue}:{worker}"


def lease_key(queue: str, worker: str) -> str:
    """Exists as long as the worker may hold jobs."""
    return f"history:lease:{queue}:{worker}"


def delays_key(queue: str) -> str:
    """Hash of job id → how often it was moved to the tail of the queue, since it alone timed out."""
    return f"history:delays:{queue}"


def suspects_key(queue: str) -> str:
    """Hash of job id → how many workers died with it alone."""
    return f"history:suspects:{queue}"


def strays_key(queue: str) -> str:
    """Hash of job id → when it was first seen in no list at all, in seconds since the epoch."""
    return f"history:strays:{queue}"


def strange_key(queue: str) -> str:
    """List of what stood in the queue and is no job id."""
    return f"history:strange:{queue}"

"""Names in Redis: of jobs, and of keys beside RQ's own. Most are the workers'; a relay reads some of them."""

from __future__ import annotations


def job_id_of(source_id: str, sequence: int) -> str:
    """The RQ job of one delivery. It does not name the fact: two records of one fact are two jobs."""
    return f"{source_id}-{sequence}"


def acknowledgement_key(source: str) -> str:
    """Hash of sequence → outcome, written by workers and emptied by the relay of that source."""
    return f"history:ack:{source}"


def holders_key(queue: str) -> str:
    """Hash of the names of those that may hold jobs of a queue → `accused` while one holds a suspect, alone."""
    return f"history:holders:{queue}"


def held_key(queue: str, holder: str) -> str:
    """List of the ids of the jobs that a holder has: one lane of a worker, as `<worker>:<8 hex digits>`."""
    return f"history:held:{queue}:{holder}"


def lease_key(queue: str, holder: str) -> str:
    """Exists as long as the holder may hold jobs."""
    return f"history:lease:{queue}:{holder}"


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

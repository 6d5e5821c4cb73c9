"""The parts of the project that are mutated, and the tests that should notice it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.mutants.mutant import Mutant
from tests.mutants.python_mutants import python_mutants


@dataclass(frozen=True)
class Target:
    """Files that are mutated, and the test files that run against each mutant.

    Attributes:
        files: Paths or patterns, relative to the root of the tree.
        tests: Paths of test files.
        but: Paths that the patterns of `files` must not match.
        mutants_of: Function that makes the mutants of a file from its path and text.
        needs_servers: Whether the tests use the fixture `pair`: PostgreSQL and Valkey, started once.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...]
    but: tuple[str, ...] = ()
    mutants_of: Callable[[str, str], list[Mutant]] = python_mutants
    needs_servers: bool = False


TARGETS = {
    "contract": Target(
        files=(
            "producers/events.py",
            "producers/event_kinds.py",
            "producers/fields.py",
            "producers/json_values.py",
            "producers/times.py",
        ),
        tests=(
            "tests/unit/test_events.py",
            "tests/unit/test_times.py",
            "tests/unit/test_trading_controller.py",
            "tests/unit/test_settings.py",
        ),
    ),
    "outbox": Target(
        files=("producers/outbox*.py", "producers/entries.py", "producers/sqlite_connections.py"),
        tests=(
            "tests/unit/test_outbox.py",
            "tests/unit/test_outbox_clock.py",
            "tests/unit/test_outbox_file.py",
            "tests/unit/test_outbox_growth.py",
            "tests/unit/test_outbox_quarantine.py",
            "tests/unit/test_outbox_salvage.py",
            "tests/unit/test_copies.py",
            "tests/unit/test_entries_in_progress.py",
            "tests/unit/test_relay.py",
            "tests/unit/test_history_producer.py",
        ),
    ),
    "relay": Target(
        files=(
            "producers/relay.py",
            "producers/relay_turn.py",
            "producers/entry_sender.py",
            "producers/acknowledgement_reader.py",
            "producers/acknowledgements.py",
            "producers/copies.py",
            "producers/rq_queue.py",
            "producers/relay_lock.py",
        ),
        tests=(
            "tests/unit/test_relay.py",
            "tests/unit/test_relay_turns.py",
            "tests/unit/test_rq_queue.py",
            "tests/unit/test_acknowledgements.py",
            "tests/unit/test_copies.py",
            "tests/unit/test_entries_in_progress.py",
            "tests/unit/test_history_producer.py",
            "tests/unit/test_outbox_growth.py",
        ),
    ),
}

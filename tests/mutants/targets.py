"""The parts of the project that are mutated, and the tests that should notice it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from tests.mutants.lua_mutants import lua_mutants
from tests.mutants.mutant import Mutant
from tests.mutants.python_mutants import python_mutants
from tests.mutants.sql_mutants import sql_mutants


@dataclass(frozen=True)
class Target:
    """Files that are mutated, and the test files that run against each mutant.

    Attributes:
        files: Paths or patterns, relative to the root of the tree.
        tests: Paths of test files, or names of single tests.
        without: Names of tests in these files that are too slow to run for each mutant.
        but: Paths that the patterns of `files` must not match.
        mutants_of: Function that makes the mutants of a file from its path and text.
        needs_servers: Whether the tests use the fixture `pair`: PostgreSQL and Valkey, started once.
        test_seconds: A test is too late after this time and five times its unmutated time.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...]
    but: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    mutants_of: Callable[[str, str], list[Mutant]] = python_mutants
    needs_servers: bool = False
    test_seconds: float = 10.0

    def arguments(self, files: Collection[str] | None = None) -> list[str]:
        """Return pytest's arguments for the tests, or for those of them in `files`."""
        chosen = [name for name in self.tests if files is None or name.partition("::")[0] in files]
        return [*chosen, *(f"--deselect={name}" for name in self.without)]


def _python_and_sql_mutants(path: str, text: str) -> list[Mutant]:
    return python_mutants(path, text) + sql_mutants(path, text)


_OUTBOX_TESTS = (
    "tests/unit/test_outbox.py",
    "tests/unit/test_outbox_clock.py",
    "tests/unit/test_outbox_counts.py",
    "tests/unit/test_outbox_file.py",
    "tests/unit/test_outbox_forks.py",
    "tests/unit/test_outbox_growth.py",
    "tests/unit/test_outbox_quarantine.py",
    "tests/unit/test_outbox_races.py",
    "tests/unit/test_outbox_salvage.py",
    "tests/unit/test_outbox_segments.py",
    "tests/unit/test_copies.py",
    "tests/unit/test_entries_in_progress.py",
    "tests/unit/test_relay.py",
)
_WORKER = "tests/integration/test_worker.py"
_THREADS = "tests/integration/test_worker_threads.py"
_WITHDRAWALS = "tests/integration/test_withdrawals.py"
_SLOW_WITHDRAWAL_TESTS = tuple(
    f"{_WITHDRAWALS}::{name}"
    for name in (
        "test_the_command_withdraws_a_row",
        "test_errors_of_the_command_are_one_line",
        "test_withdrawing_does_not_wait_for_ever",
        "test_import_leaves_a_withdrawn_row_out_and_verify_names_it",
        "test_an_import_with_another_zone_after_a_withdrawal_is_no_copied_outbox",
    )
)
_RESERVATIONS = "tests/integration/test_reservations.py"

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
            "tests/unit/test_event_kinds.py",
            "tests/unit/test_times.py",
            "tests/unit/test_trading_controller.py",
            "tests/unit/test_settings.py",
            "tests/unit/test_legacy_json.py",
        ),
    ),
    "outbox": Target(
        files=("producers/outbox*.py", "producers/entries.py", "producers/sqlite_connections.py"),
        but=("producers/outbox_segments.py",),
        tests=_OUTBOX_TESTS,
        without=(
            "tests/unit/test_outbox_file.py::test_processes_that_use_a_removed_file_lose_no_entry",
            "tests/unit/test_outbox_salvage.py::test_processes_that_find_damage_together_quarantine_the_file_once",
        ),
    ),
    "outbox SQL": Target(
        files=("producers/outbox*.py",),
        but=("producers/outbox_segments.py",),
        tests=_OUTBOX_TESTS,
        mutants_of=sql_mutants,
    ),
    "digests": Target(
        files=("producers/digests.py", "producers/segments.py", "producers/outbox_segments.py"),
        tests=("tests/unit/test_digests.py", "tests/unit/test_outbox_segments.py"),
        mutants_of=_python_and_sql_mutants,
    ),
    "content": Target(
        files=("consumers/db/stored_content.py", "consumers/ops/content_audit.py", "consumers/ops/seal.py"),
        tests=("tests/integration/test_content_audit.py", "tests/unit/test_seals.py"),
        mutants_of=_python_and_sql_mutants,
        needs_servers=True,
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
            "tests/unit/test_outbox.py::test_only_one_relay_has_the_lock",
            "tests/unit/test_outbox_file.py",
            "tests/unit/test_outbox_quarantine.py",
            "tests/unit/test_outbox_salvage.py",
        ),
    ),
    "reservations": Target(
        files=("consumers/worker/reservations.py",),
        tests=(
            _RESERVATIONS,
            f"{_WORKER}::test_many_unusable_ids_do_not_end_a_burst",
            f"{_WORKER}::test_an_unusable_job_id_is_quarantined",
            f"{_WORKER}::test_one_unusable_reservation_list_does_not_prevent_recovery_of_the_others",
            f"{_THREADS}::test_a_poison_candidate_runs_while_no_other_job_runs",
            f"{_THREADS}::test_a_crash_counts_only_against_a_poison_candidate_that_ran_alone",
        ),
        needs_servers=True,
    ),
    "batch": Target(
        files=("consumers/worker/batch.py", "consumers/worker/deliveries.py"),
        tests=(
            "tests/unit/test_deliveries.py",
            "tests/integration/test_batch_processing.py",
            "tests/unit/test_trace_context.py",
            "tests/integration/test_defects.py::test_an_exception_after_the_commit_does_not_change_the_outcome",
            "tests/integration/test_defects.py::test_an_event_that_was_stored_before_its_workers_crashed_is_not_rejected",
            "tests/integration/test_defects.py::test_an_exception_of_any_class_rejects_only_that_event",
            _WITHDRAWALS,
        ),
        without=_SLOW_WITHDRAWAL_TESTS,
        needs_servers=True,
    ),
    "inserts": Target(
        files=("consumers/db/inserts.py", "consumers/db/outcomes.py", "consumers/db/withdrawals.py"),
        tests=(
            _WITHDRAWALS,
            "tests/integration/test_schema.py",
            "tests/integration/test_batch_processing.py",
            "tests/test_history_operations.py",
            f"{_WORKER}::test_a_batch_can_have_the_same_event_and_the_same_job_twice",
            f"{_WORKER}::test_two_workers_with_the_same_events_in_opposite_order_do_not_deadlock",
            f"{_WORKER}::test_a_row_id_that_is_taken_rejects_no_event",
            "tests/integration/test_defects.py::test_an_event_that_was_stored_before_its_workers_crashed_is_not_rejected",
            "tests/integration/test_migration.py::test_verify_compares_derived_columns_too",
            "tests/integration/test_migration.py::test_verify_finds_differences_in_both_directions",
        ),
        without=_SLOW_WITHDRAWAL_TESTS,
        mutants_of=_python_and_sql_mutants,
        needs_servers=True,
    ),
    "queries": Target(
        files=(
            "consumers/db/queries.py",
            "consumers/db/portfolio_queries.py",
            "consumers/db/archive_queries.py",
        ),
        tests=(
            "tests/integration/test_queries.py",
            "tests/test_history_operations.py",
            "tests/integration/test_api.py",
            "tests/integration/test_page_data.py",
            "tests/integration/test_performance.py",
            "tests/integration/test_read_plans.py",
        ),
        mutants_of=_python_and_sql_mutants,
        needs_servers=True,
    ),
    "lua": Target(
        files=("consumers/worker/scripts/*.lua",),
        tests=(
            _RESERVATIONS,
            "tests/integration/test_completion_script.py",
            "tests/integration/test_redis_users.py::test_a_forbidden_count_of_crashes_is_reported_and_changes_nothing",
            "tests/integration/test_redis_users.py::test_a_worker_that_may_not_write_rqs_records_of_jobs_says_so_once",
            "tests/integration/test_same_as_rq.py::test_every_key_in_redis_equals_that_of_rqs_worker",
            f"{_WORKER}::test_an_unusable_job_id_is_quarantined",
            f"{_WORKER}::test_many_unusable_ids_do_not_end_a_burst",
            f"{_WORKER}::test_many_finished_jobs_of_a_stock_worker_are_deleted_in_parts",
            f"{_WORKER}::test_a_crash_is_counted_once_although_the_queue_cannot_be_written",
            f"{_WORKER}::test_one_unusable_reservation_list_does_not_prevent_recovery_of_the_others",
            f"{_WORKER}::test_unusable_dependencies_affect_only_the_job_that_has_them",
        ),
        mutants_of=lua_mutants,
        needs_servers=True,
    ),
    "schema": Target(
        files=("schema.sql",),
        tests=(
            "tests/integration/test_schema.py",
            "tests/integration/test_roles.py",
            "tests/integration/test_other_schemas.py",
            "tests/integration/test_read_plans.py",
            "tests/test_history_operations.py",
            f"{_WITHDRAWALS}::test_a_withdrawn_snapshot_is_kept_with_exact_values",
        ),
        mutants_of=sql_mutants,
        needs_servers=True,
    ),
}

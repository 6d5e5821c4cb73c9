import pytest

from tests.integration.test_worker import (  # noqa: F401  # collected here
    test_a_burst_stores_all_events_and_leaves_no_reservation,
    test_a_crash_is_counted_once_although_the_queue_cannot_be_written,
    test_a_job_in_no_list_is_requeued,
    test_a_job_that_crashes_three_workers_alone_is_a_poison_event,
    test_a_job_whose_key_is_not_a_hash_is_rejected,
    test_a_key_of_a_wrong_type_is_quarantined,
    test_a_lease_is_shortened_after_redis_clock_was_set_back,
    test_a_queue_that_is_not_a_list_is_named_in_the_log,
    test_a_reservation_whose_reply_was_lost_is_returned_again,
    test_a_worker_continues_after_redis_lost_everything,
    test_an_unusable_job_id_is_quarantined,
    test_each_step_of_maintenance_runs_although_others_fail,
    test_many_finished_jobs_of_a_stock_worker_are_deleted_in_parts,
    test_one_bad_event_in_a_batch_is_rejected_alone,
    test_orphans_of_stock_workers_are_requeued_not_failed,
    test_the_events_of_a_killed_worker_are_stored_by_the_next,
    test_the_jobs_of_a_dead_worker_return_to_the_front_and_run_alone,
    test_unusable_dependencies_affect_only_the_job_that_has_them,
)

pytestmark = pytest.mark.usefixtures("database_url")

from tests.integration.test_audit import (  # noqa: F401  # collected here, with their fixtures
    mixed,
    test_a_lost_row_is_found_and_named,
    test_every_number_is_accounted_for,
    test_failed_lists_and_shows_what_was_refused,
)

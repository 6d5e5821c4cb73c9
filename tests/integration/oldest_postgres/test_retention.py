from tests.integration.test_retention import (  # noqa: F401  # collected here
    pytestmark,
    test_a_page_costs_its_rows_wherever_the_boundary_is,
    test_a_retired_fact_is_a_duplicate_and_other_content_is_a_conflict,
    test_beside_a_move_new_facts_go_in_at_once_and_old_ones_are_found_after_it,
    test_readers_cannot_tell_and_the_way_back_is_complete,
)

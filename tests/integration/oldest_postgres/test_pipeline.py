from tests.integration.test_pipeline import (  # noqa: F401  # collected here
    test_a_fact_sent_twice_is_stored_once_and_both_deliveries_get_the_same_row,
    test_a_trading_cycle_makes_one_row_of_portfolio_history,
    test_events_in_any_order_make_the_same_tables,
    test_signals_make_one_row_with_their_count_and_the_same_json,
    test_the_same_id_with_other_content_is_rejected_and_reported,
)

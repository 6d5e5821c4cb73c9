from tests.integration.test_pipeline import (  # noqa: F401  # collected here
    test_a_fact_sent_twice_is_stored_once_and_both_deliveries_get_the_same_row,
    test_a_trading_cycle_makes_one_row_of_portfolio_history,
    test_the_same_id_with_other_content_is_rejected_and_reported,
)

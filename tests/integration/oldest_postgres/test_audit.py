from tests.integration.test_audit import (  # noqa: F401  # collected here, with their fixtures
    mixed,
    test_audit_accounts_for_every_number,
    test_audit_reports_lost_rows,
    test_failed_lists_and_shows_rejected_events,
)

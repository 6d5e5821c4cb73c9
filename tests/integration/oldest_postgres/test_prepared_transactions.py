"""A prepared transaction, which only a server can have that was started for it."""

from __future__ import annotations

import pytest

from consumers.db.engine import engine
from consumers.errors import AdoptionRefused
from consumers.legacy.adoption import adopt_legacy
from tests.legacy_databases import FIRST_GENERATION


def test_a_prepared_transaction_on_the_old_tables_is_named(empty_database_url: str) -> None:
    """It has no session that could be ended: an operator must find it in pg_prepared_xacts."""
    with engine().begin() as db:
        db.exec_driver_sql(FIRST_GENERATION)
    with engine().connect() as db:
        db.exec_driver_sql("SELECT FROM signal_archives")
        db.exec_driver_sql("PREPARE TRANSACTION 'forgotten'")
    try:
        with pytest.raises(AdoptionRefused, match="locked within 3 s: locked by a prepared transaction. Nothing was"):
            adopt_legacy(engine())
    finally:
        with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            db.exec_driver_sql("ROLLBACK PREPARED 'forgotten'")

"""Transactions on the database that the settings name: `get_db`."""

from consumers.db.engine import get_db

__all__ = ["get_db"]

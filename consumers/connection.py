"""`get_db()`: one transaction on the database of the settings."""

from consumers.db.engine import get_db

__all__ = ["get_db"]

"""What PostgreSQL is asked to do, beside opening the connection (see consumers.connection)."""

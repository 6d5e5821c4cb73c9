"""The SQL for what workers write and readers list, and for logins; other SQL stands with what asks it."""

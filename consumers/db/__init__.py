"""The SQL for what workers write and readers list, logins and retired rows; other SQL stands with what asks it."""

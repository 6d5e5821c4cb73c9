"""Moving in and out: import and verify of old history, adoption of old tables, export to the old format."""

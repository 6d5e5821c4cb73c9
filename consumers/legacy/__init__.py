"""Import and verify old history, adopt old tables, and export history to the old format."""

"""SQL of the project: engine, schema, inserts, queries, outcomes and login roles."""

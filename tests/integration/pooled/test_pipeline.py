from tests.integration.test_pipeline import *  # noqa: F403  # every test of it

# It compares the server processes of two connections, which are the pooler's.
del test_a_forked_child_opens_new_database_connections  # noqa: F821  # imported above

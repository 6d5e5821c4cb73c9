from tests.integration.test_database_facts import *  # noqa: F403  # every test of it

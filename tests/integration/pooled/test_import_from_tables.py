from tests.integration.test_import_from_tables import *  # noqa: F403  # every test of it

from tests.integration.test_other_schemas import *  # noqa: F403  # every test of it

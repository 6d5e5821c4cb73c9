from tests.integration.test_pipeline import *  # noqa: F403  # every test of it

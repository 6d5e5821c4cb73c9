from tests.integration.test_page_data import *  # noqa: F403  # every test of it

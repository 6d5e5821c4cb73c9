from tests.integration.test_redis_users import *  # noqa: F403  # every test of it

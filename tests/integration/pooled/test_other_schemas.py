from tests.integration.test_other_schemas import (  # noqa: F401
    passwords,
    test_a_schema_in_the_url_is_created_too,
    test_init_db_adopts_old_tables_in_that_schema,
    test_init_db_makes_a_schema_in_which_its_logins_find_the_tables,
    test_owner_with_a_schema_named_like_the_owner,
    test_roles_of_another_owner_need_the_admin_option,
)

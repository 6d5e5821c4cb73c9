"""The line for a command that Redis forbids or does not have, for the messages of each server."""

from __future__ import annotations

import pytest
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from producers.redis_url import is_forbidden, redis_reason

_COMMAND = "Redis forbids the command {0} to this user: run ACL SETUSER <user> +{0} ("
_KEY = "Redis forbids a key to this user: ACL LOG names it, and ACL SETUSER <user> ~<pattern> allows it;"
_CHANNEL = "Redis forbids a channel to this user: run ACL SETUSER <user> '&rq:pubsub:*' ("


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NoPermissionError("User w has no permissions to run the 'config|get' command"), _COMMAND.format("config|get")),
        (NoPermissionError("this user has no permissions to run the 'set' command"), _COMMAND.format("set")),
        (NoPermissionError("this user has no permissions to run the 'set' command or its subcommand"),
         _COMMAND.format("set")),
        (ResponseError("ACL failure in script: User w has no permissions to run the 'set' command script: on @user:1."),
         _COMMAND.format("set")),
        (NoPermissionError("Command # 1 (SET a 1) of pipeline caused error: User w has no permissions to run the 'set'"
                           " command"), _COMMAND.format("set")),
        (ResponseError("The user executing the script can't run this command or subcommand script: 0a, on @user:1."),
         "Redis forbids a command to this user: ACL LOG names it, and ACL SETUSER <user> +<command> allows it;"),
        (NoPermissionError("No permissions to access a key"), _KEY),
        (NoPermissionError("this user has no permissions to access one of the keys used as arguments"), _KEY),
        (ResponseError("The user executing the script can't access at least one of the keys mentioned in the command"
                       " arguments script: 0a, on @user:1."), _KEY),
        (NoPermissionError("No permissions to access a channel"), _CHANNEL),
        (NoPermissionError("this user has no permissions to access one of the channels used as arguments"), _CHANNEL),
    ],
)  # fmt: skip
def test_a_forbidden_command_is_named_with_the_rule_that_allows_it(error: RedisError, reason: str) -> None:
    """Valkey 9 and Redis 7 name the command; a script of Redis 7 does not. The server's words follow."""
    assert is_forbidden(error)
    assert redis_reason(error).startswith(reason)
    assert str(error) in redis_reason(error)


def test_a_command_that_the_server_does_not_have_is_named() -> None:
    error = ResponseError("unknown command 'CONFIG', with args beginning with: 'GET' 'appendfsync' ")
    assert redis_reason(error).startswith("Redis does not have command CONFIG, or it is renamed or disabled there (")
    assert not is_forbidden(error)


def test_any_other_error_is_its_first_line() -> None:
    assert redis_reason(ResponseError("OOM used memory\nmore")) == "OOM used memory"
    assert redis_reason(RedisError()) == "RedisError"
    assert not is_forbidden(OSError("no permissions to run the 'set' command"))

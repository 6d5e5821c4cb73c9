"""Mutants of Lua scripts."""

from __future__ import annotations

from tests.mutants.lua_mutants import lua_mutants


def changed_lines(text: str) -> list[str]:
    """Return the changed line of each mutant, without repeated blanks."""
    return [" ".join(mutant.text.splitlines()[mutant.line - 1].split()) for mutant in lua_mutants("a.lua", text)]


def test_a_condition_is_negated_and_its_operator_and_numbers_change() -> None:
    assert changed_lines("if left > 20 then left = 0 end") == [
        "if not (left > 20) then left = 0 end",
        "if left >= 20 then left = 0 end",
        "if left > 10 then left = 0 end",
        "if left > 20 then end",
        "if left > 20 then left = 1 end",
    ]


def test_a_call_of_redis_is_removed_and_its_arguments_change() -> None:
    assert changed_lines("redis.call('LMOVE', KEYS[1], KEYS[2], 'RIGHT', 'LEFT')  -- in order") == [
        "-- in order",
        "redis.call('LMOVE', KEYS[2], KEYS[2], 'RIGHT', 'LEFT') -- in order",
        "redis.call('LMOVE', KEYS[1], KEYS[3], 'RIGHT', 'LEFT') -- in order",
        "redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'LEFT') -- in order",
        "redis.call('LMOVE', KEYS[1], KEYS[2], 'RIGHT', 'RIGHT') -- in order",
    ]


def test_a_loop_is_never_entered_because_a_negated_condition_might_not_end_it() -> None:
    assert changed_lines("while move() do end") == ["while false do end"]


def test_a_removed_statement_may_have_several_lines() -> None:
    (first, *_) = lua_mutants("a.lua", "return {a,\n    b}\n")
    assert (first.line, first.change, first.text.strip()) == (1, "return {a, b} is removed", "")


def test_comments_and_local_declarations_are_not_removed() -> None:
    assert changed_lines("-- if a == 1\nlocal a = b") == []

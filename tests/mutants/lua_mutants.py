"""Mutants of Lua scripts, by tokens.

The scripts have no long strings, no functions as arguments, and call each function with parentheses. Then a name begins
a statement if, outside of brackets, the token before it ends an expression or a block's head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.mutants.edits import Edit, Token, depths, mutants, removed, replaced, tokens
from tests.mutants.mutant import Mutant

_TOKEN = re.compile(
    r"""(?P<comment>--[^\n]*)|(?P<string>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")|(?P<number>\d+)|(?P<name>[A-Za-z_]\w*)
    |(?P<operator>[=~<>]=|\.{1,3}|[^\s\w])""",
    re.VERBOSE,
)
_OTHER = {
    "==": "~=", "~=": "==", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "and": "or", "or": "and", "+": "-", "-": "+",
    "true": "false", "false": "true", "min": "max", "max": "min", "'LEFT'": "'RIGHT'", "'RIGHT'": "'LEFT'",
    "'RPUSH'": "'LPUSH'", "'LPUSH'": "'RPUSH'", "'HSETNX'": "'HSET'",
}  # fmt: skip
_KEYWORDS = frozenset([
    "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "if", "in", "local", "nil", "not", "or",
    "repeat", "return", "then", "true", "until", "while",
])  # fmt: skip
_BEFORE_STATEMENT = frozenset(
    ["do", "else", "end", "repeat", "then", ";", ")", "]", "}", "...", "nil", "true", "false"]
)
_AFTER_STATEMENT = frozenset(["else", "elseif", "end", "for", "if", "local", "repeat", "until", "while"])
_CALLS = frozenset(["call", "pcall", "attempt"])


def lua_mutants(path: str, text: str) -> list[Mutant]:
    """Return the mutants of a script: statements removed, operators, constants changed, conditions negated."""
    found = tokens(_TOKEN, text)
    return list(mutants(path, text, [*_statements(text, found), *_conditions(text, found), *_tokens(found)]))


def _statements(text: str, found: list[Token]) -> Iterator[Edit]:
    """Yield the removal of each statement that is a call, an assignment or a return."""
    depth = depths(found)
    starts = [n for n in range(len(found)) if depth[n] == 0 and _begins_statement(found, n)]
    for n in starts:
        ends = (m for m in range(n + 1, len(found)) if depth[m] == 0 and (m in starts or _ends(found[m])))
        end = found[next(ends, len(found)) - 1].end
        yield removed(text, found[n].start, end)


def _begins_statement(found: list[Token], n: int) -> bool:
    if found[n].text in ("return", "break"):
        return True
    if found[n].kind != "name" or found[n].text in _KEYWORDS:
        return False
    before = found[n - 1] if n else None
    if before is None or before.text in _BEFORE_STATEMENT or before.kind in ("string", "number"):
        return True
    return before.kind == "name" and before.text not in _KEYWORDS


def _ends(token: Token) -> bool:
    return token.text in _AFTER_STATEMENT


def _conditions(text: str, found: list[Token]) -> Iterator[Edit]:
    """Yield the negation of each condition, and each loop never entered: a negated one might not end."""
    for n, token in enumerate(found):
        if token.text not in ("if", "elseif", "while"):
            continue
        last = next(m for m in range(n, len(found)) if found[m].text in ("then", "do")) - 1
        start, end = found[n + 1].start, found[last].end
        if token.text == "while":
            yield Edit(start, end, "false", "the loop is never entered")
        else:
            yield Edit(start, end, f"not ({text[start:end]})", "the condition is negated")


def _tokens(found: list[Token]) -> Iterator[Edit]:
    for n, token in enumerate(found):
        is_command = n > 1 and found[n - 2].text in _CALLS
        if "[#" in ("".join(one.text for one in found[max(n - m, 0) : n - m + 2]) for m in (3, 4)):
            continue  # in list[#list + 1] = item: the removal of the statement is enough
        if [one.text for one in found[n - 1 : n + 4]] == [",", "1", ",", "true", ")"] or (
            [one.text for one in found[n - 3 : n + 2]] == [",", "1", ",", "true", ")"]
        ):
            continue  # string.find from the beginning, without a pattern
        if token.text == "not":
            yield Edit(token.start, token.end, "", "not is removed")
        elif token.text == "-" and found[n - 1].text in (",", "(", "==", "~=", "or", "and", "return"):
            yield Edit(token.start, token.end, "", "- is removed")
        elif token.text in _OTHER:
            yield replaced(token, _OTHER[token.text])
        elif token.kind == "number":
            number = int(token.text)
            yield replaced(token, str(number + 1 if number <= 10 else number // 2))
        elif token.kind == "string" and not is_command:
            yield replaced(token, "'other'")

"""Mutants of SQL, by tokens: in schema.sql, and in the string constants of Python files that contain SQL.

Keywords are in upper case. In a formatted string, a replacement field counts as a name.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

from tests.mutants.edits import Edit, Token, depths, mutants, removed, replaced, tokens
from tests.mutants.mutant import Mutant

_TOKEN = re.compile(
    r"""(?P<comment>--[^\n]*)|(?P<string>'(?:[^'\n]|'')*')|(?P<number>\d+(?!\w))
    |(?P<name>"\w+"|\\"\w+\\"|[:@]\w+|\{[^{}]*\}|[A-Za-z_](?:[\w.]|\{[^{}]*\})*)
    |(?P<operator><=|>=|<>|!=|:=|->>|->|@>|\|\||\$\$|[^\s\w])""",
    re.VERBOSE,
)
_IS_SQL = re.compile(
    r"\b(SELECT|INSERT|UPDATE|DELETE|FROM|WHERE|ORDER BY|DESC|BETWEEN|CAST|IS NULL|LIMIT|PRAGMA|LOCK TABLE|AND|OR)\b"
    r"|(<|>|=|<=|>=|<>) \(?[:{]\w+"
)
_OTHER = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "=": "<>", "<>": "=", "!=": "=", "min": "max", "max": "min",
    "true": "false", "false": "true", "+": "-", "-": "+", "AND": "OR", "OR": "AND",
}  # fmt: skip
_CLAUSES = frozenset([
    "WHERE", "ORDER", "GROUP", "LIMIT", "RETURNING", "ON", "UNION", "THEN", "ELSE", "END", "HAVING", "FROM", "WHEN",
    "LOOP", "AS", "OFFSET", "SET", "WINDOW", ";", ",",
])  # fmt: skip
_ENDS = _CLAUSES | {"AND", "OR"}
_STATEMENTS = frozenset(["CREATE", "GRANT", "REVOKE", "ALTER", "EXECUTE", "UPDATE", "DELETE", "RAISE", "LOCK"])
_BEFORE_COLUMN = frozenset(["(", ",", "SELECT", "BY", "DISTINCT"])
_AFTER_COLUMN = frozenset([",", ")", "DESC", "FROM", "ORDER", "RETURNING", "LIMIT"])
_UNTOUCHED = re.compile(r"COMMENT ON[^;]*;|RAISE [^;]*;|GRANT [^;]*;|REVOKE [^;]*;|CREATE TABLE IF NOT EXISTS \w+ \(")


def sql_mutants(path: str, text: str) -> list[Mutant]:
    """Return the mutants of the SQL in a file: all of it in an .sql file, and the string constants of a Python file."""
    if path.endswith(".sql"):
        return list(mutants(path, text, [*_edits(text, 0, len(text)), *_statements(text)]))
    parts = [edit for start, end in _sql_strings(text) for edit in _edits(text, start, end)]
    return list(mutants(path, text, parts))


def _sql_strings(text: str) -> Iterator[tuple[int, int]]:
    """Yield the offsets of the contents of each string constant with SQL; not of docstrings and messages."""
    skipped = [
        (node.lineno, node.end_lineno or 0)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    nested, begin = 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        begin = token.start if nested == 0 else begin
        nested += {"FSTRING_START": 1, "FSTRING_END": -1}.get(name, 0)
        if nested == 0 and name in ("STRING", "FSTRING_END"):
            start, end = (offsets[row - 1] + column for row, column in (begin, token.end))
            if _IS_SQL.search(text, start, end) and not any(a <= begin[0] <= b for a, b in skipped):
                quotes = re.compile(r"[rfRF]*(\"{3}|'{3}|\"|')").match(text, start, end)
                assert quotes is not None
                yield quotes.end(), end - len(quotes[1])


def _statements(text: str) -> Iterator[Edit]:
    """Yield the removal of each statement of the schema, of tables aside."""
    for match in re.finditer(rf"(?m)^ *({'|'.join(sorted(_STATEMENTS))}) [^;]*;", text):
        body = match[0].lstrip()
        if not body.startswith(("CREATE TABLE", "CREATE OR REPLACE FUNCTION")):
            yield removed(text, match.end() - len(body), match.end())


def _edits(text: str, start: int, end: int) -> Iterator[Edit]:
    found = tokens(_TOKEN, text, start, end)
    depth = depths(found)
    kept = [match.span() for match in _UNTOUCHED.finditer(text, start, end)]
    for n, token in enumerate(found):
        if not any(a <= token.start < b for a, b in kept):
            yield from _operators(found, n)
            yield from _clauses(text, found, depth, n)
            yield from _words(text, found, n)
            yield from _lists(text, found, n)


def _operators(found: list[Token], n: int) -> Iterator[Edit]:
    token, before = found[n], found[n - 1].text if n else ""
    if token.text in _OTHER and not (
        (token.text == "=" and _assigns(found, n))
        or (token.text == "AND" and _is_between(found, n))
        or (token.text == "OR" and before == "CREATE")
    ):
        yield replaced(token, _OTHER[token.text])
    elif token.kind == "number" and before != "SELECT":  # the value that EXISTS selects
        yield replaced(token, str(int(token.text) + 1))
    elif token.kind == "string" and before not in ("COMMENT", "IS"):
        yield replaced(token, "'other'")


def _assigns(found: list[Token], n: int) -> bool:
    """Whether this = is an assignment of SET, PRAGMA or USING."""
    for token in reversed(found[:n]):
        if token.text in ("SET", "PRAGMA", "USING", "LOCAL"):
            return True
        if token.text in _CLAUSES - {","}:
            return False
    return False


def _is_between(found: list[Token], n: int) -> bool:
    for token in reversed(found[:n]):
        if token.text == "BETWEEN":
            return True
        if token.text in _ENDS:
            return False
    return False


def _clauses(text: str, found: list[Token], depth: list[int], n: int) -> Iterator[Edit]:
    """Yield the removal of the condition, the clause or the default that begins with this token."""
    token, after = found[n], found[n + 1].text if n + 1 < len(found) else ""
    match token.text, after:
        case (("AND" | "OR"), _) if after != "REPLACE" and not _is_between(found, n):
            yield removed(text, token.start, _end_of_condition(found, depth, n))
        case (("WHERE" | "ORDER" | "LIMIT"), _) if after:
            yield _without_clause(text, found, depth, n)
        case "ON", "CONFLICT":
            ends = (one.start for one in found[n + 1 :] if one.text in ("WHERE", "RETURNING"))
            yield removed(text, token.start, next(ends, found[-1].end))
        case "DEFAULT", _ if found[n - 1].text != "BY":
            yield removed(text, token.start, _end_of_condition(found, depth, n))


def _words(text: str, found: list[Token], n: int) -> Iterator[Edit]:
    """Yield the removal or the opposite of one word."""
    token, before, after = found[n], found[n - 1].text, found[n + 1].text if n + 1 < len(found) else ""
    match token.text, after:
        case "NOT", "NULL" if before != "IS":
            yield removed(text, token.start, found[n + 1].end)
        case "NOT", _ if (before, after) != ("IF", "EXISTS") or "CREATE" not in text:
            yield Edit(token.start, token.end, "", "NOT is removed")
        case "IS", "NULL":
            yield Edit(token.end, token.end, " NOT", "IS NULL becomes IS NOT NULL")
        case ("DESC", _) | ("DISTINCT", _) if before not in ("IS", "NOT"):
            yield removed(text, token.start, token.end)
        case "UNION", "ALL":
            yield removed(text, found[n + 1].start, found[n + 1].end)
        case "JOIN", _:
            yield replaced(token, "LEFT JOIN")


def _without_clause(text: str, found: list[Token], depth: list[int], n: int) -> Edit:
    """Return the removal of a clause, or of the first condition if a WHERE has several."""
    end = _end_of_condition(found, depth, n)
    following = next((one for one in found if one.start >= end), None)
    if found[n].text == "WHERE" and following is not None and following.text in ("AND", "OR"):
        return removed(text, found[n + 1].start, following.end)
    return removed(text, found[n].start, _end_of_clause(found, depth, n))


def _end_of_condition(found: list[Token], depth: list[int], n: int) -> int:
    """Return the offset behind the condition or the terms that begin after token `n`."""
    between = False
    for m in range(n + 1, len(found)):
        if depth[m] < depth[n] or (depth[m] == depth[n] and found[m].text in _ENDS):
            if not (between and found[m].text == "AND"):
                return found[m - 1].end
            between = False
        between = between or (found[m].text == "BETWEEN" and depth[m] == depth[n])
    return found[-1].end


def _end_of_clause(found: list[Token], depth: list[int], n: int) -> int:
    for m in range(n + 1, len(found)):
        if depth[m] < depth[n] or (depth[m] == depth[n] and found[m].text in _CLAUSES - {","}):
            return found[m - 1].end
    return found[-1].end


def _lists(text: str, found: list[Token], n: int) -> Iterator[Edit]:
    """Yield exchanged columns, coalesce without its alternative, and a table without one constraint."""
    token = found[n]
    if token.text == "," and 1 < n < len(found) - 1:
        left, right = found[n - 1], found[n + 1]
        after = found[n + 2].text if n + 2 < len(found) else ")"
        if left.kind == right.kind == "name" and found[n - 2].text in _BEFORE_COLUMN and after in _AFTER_COLUMN:
            swapped = right.text + text[left.end : right.start] + left.text
            yield Edit(left.start, right.end, swapped, f"{left.text} and {right.text} are exchanged")
    elif token.text == "coalesce":
        depth = depths(found)
        comma = next(m for m in range(n, len(found)) if found[m].text == "," and depth[m] == depth[n] + 1)
        end = next(m for m in range(n + 2, len(found)) if found[m].text == ")" and depth[m] == depth[n])
        yield removed(text, found[comma].start, found[end].start)
    elif token.text == "CONSTRAINT" and found[n - 1].text == ",":
        depth = depths(found)
        ends = (
            m for m in range(n, len(found)) if depth[m] < depth[n] or (found[m].text == "," and depth[m] == depth[n])
        )
        yield removed(text, found[n - 1].start, found[next(ends) - 1].end)

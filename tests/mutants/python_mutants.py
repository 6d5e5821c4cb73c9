"""Mutants of Python source: one operator, constant, condition or statement changed at a time.

Left out, because no test should depend on them: docstrings, annotations, decorators, texts and f-strings, logging
calls, assertions, `__repr__`, `__all__`, constants named `…_SECONDS` and what only the type checker sees.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tests.mutants.mutant import Mutant

_OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "&"),
}
_LOGGING = re.compile(r"(_?log(ger|ging)?)\.(debug|info|warning|error|exception|critical|log)")
_LONGEST_EXCERPT = 60
_Located = ast.expr | ast.stmt


class Edit(NamedTuple):
    """Replacement of the bytes from `start` to `end`, given as (line, byte in the line)."""

    start: tuple[int, int]
    end: tuple[int, int]
    new: str
    change: str = ""


def python_mutants(path: str, text: str) -> list[Mutant]:
    """Return all mutants of a Python file, in the order of its lines. Two equal changes of a line are numbered."""
    source = _Source(text)
    edits = sorted(source.edits(ast.parse(text)))
    found: Counter[tuple[int, str]] = Counter()
    mutants = []
    for edit in edits:
        change = edit.change or f"{source.excerpt(edit.start, edit.end)} becomes {edit.new}"
        key = (edit.start[0], change)
        found[key] += 1
        number = f" ({found[key]})" if found[key] > 1 else ""
        mutants.append(Mutant(path, edit.start[0], change + number, source.changed(edit)))
    return mutants


class _Source:
    """Text of a file; the positions of syntax trees count bytes."""

    def __init__(self, text: str) -> None:
        self._bytes = text.encode()
        self._line_starts = [0]
        for line in self._bytes.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))

    def _offset(self, place: tuple[int, int]) -> int:
        return self._line_starts[place[0] - 1] + place[1]

    def _between(self, start: tuple[int, int], end: tuple[int, int]) -> str:
        return self._bytes[self._offset(start) : self._offset(end)].decode()

    def excerpt(self, start: tuple[int, int], end: tuple[int, int]) -> str:
        """Return this part on one line, shortened."""
        text = " ".join(self._between(start, end).split())
        return text if len(text) <= _LONGEST_EXCERPT else text[: _LONGEST_EXCERPT - 1] + "…"

    def changed(self, edit: Edit) -> str:
        first, last = self._offset(edit.start), self._offset(edit.end)
        return (self._bytes[:first] + edit.new.encode() + self._bytes[last:]).decode()

    def edits(self, node: ast.AST) -> Iterator[Edit]:
        """Yield the edits of this node and of all nodes below it."""
        if _is_left_out(node):
            return
        yield from self._of_operator(node)
        yield from _of_constant(node)
        yield from _of_condition(node)
        if isinstance(node, ast.stmt):
            yield from self._of_statement(node)
        for name, value in ast.iter_fields(node):
            if name in {"annotation", "returns", "decorator_list", "bases", "keywords"} and not isinstance(
                node, ast.Call
            ):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.edits(child)

    def _of_operator(self, node: ast.AST) -> Iterator[Edit]:
        match node:
            case ast.Compare():
                operands = [node.left, *node.comparators]
                for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
                    yield from self._operator(operator, left, right)
            case ast.BoolOp():
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from self._operator(node.op, left, right)
            case ast.BinOp():
                yield from self._operator(node.op, node.left, node.right)
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                word = "not" if isinstance(node.op, ast.Not) else "-"
                yield Edit(_start(node), (node.lineno, node.col_offset + len(word)), "", f"removed {word}")

    def _of_statement(self, node: ast.stmt) -> Iterator[Edit]:
        match node:
            case ast.AugAssign(op=ast.Add() | ast.Sub()):
                old, new = _OPERATORS[type(node.op)]
                yield Edit(_end(node.target), _start(node.value), f" {new}= ", f"{old}= becomes {new}=")
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                yield _replaced(value, "None")
            case ast.Expr(value=ast.Yield(value=ast.expr() as value)) if not isinstance(value, ast.Constant):
                yield _replaced(value, "None")
        if _is_removable(node):
            yield Edit(_start(node), _end(node), "pass", f"removed {self.excerpt(_start(node), _end(node))}")

    def _operator(self, operator: ast.AST, left: ast.expr, right: ast.expr) -> Iterator[Edit]:
        old, new = _OPERATORS.get(type(operator), ("", ""))
        between = self._between(_end(left), _start(right))
        if old and "#" not in between:  # a comment could contain the operator
            pattern = r"\s+".join(map(re.escape, old.split()))
            words = re.sub(rf"(?<!\w){pattern}(?!\w)", new, between, count=1)
            yield Edit(_end(left), _start(right), words, f"{old} becomes {new}")


def _of_constant(node: ast.AST) -> Iterator[Edit]:
    """Yield edits of numbers, booleans, and texts that are keys or are compared."""
    match node:
        case ast.Constant(value=bool()):
            yield _replaced(node, str(not node.value))
        case ast.Constant(value=int() | float() as value):
            yield _replaced(node, repr(value + 1))
        case ast.Compare():
            yield from (_key(one) for one in (node.left, *node.comparators) if _is_text(one))
        case ast.Dict():
            yield from (_key(one) for one in node.keys if one is not None and _is_text(one))
        case ast.Subscript(slice=ast.Constant(value=str()) as key):
            yield _key(key)
        case ast.Call(func=ast.Attribute(attr="get" | "pop"), args=[ast.Constant(value=str()) as key, *_]):
            yield _key(key)


def _of_condition(node: ast.AST) -> Iterator[Edit]:
    """Yield edits that decide which branch runs, how often a loop does, and whether an error is caught."""
    match node:
        case ast.If() | ast.IfExp() if not isinstance(node.test, ast.Constant):
            yield _replaced(node.test, "True")
            yield _replaced(node.test, "False")
        case ast.While() if not isinstance(node.test, ast.Constant):
            yield _replaced(node.test, "False")
        case ast.For() | ast.AsyncFor():
            yield _replaced(node.iter, "()")
        case ast.comprehension():
            yield from (_replaced(test, "True") for test in node.ifs)
        case ast.ExceptHandler(type=ast.expr() as kind):
            yield _replaced(kind, "()")


def _is_left_out(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Assert() | ast.FunctionDef(name="__repr__"):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name == "__all__" or name.endswith("_SECONDS")
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Call():
            return _LOGGING.fullmatch(ast.unparse(node.func)) is not None
        case ast.Expr(value=ast.Call() as value):
            return _is_left_out(value)
    return False


def _is_removable(node: ast.stmt) -> bool:
    """Whether the statement can be replaced by `pass`: its names are not needed to run what follows."""
    match node:
        case ast.Expr(value=ast.Constant()):
            return False
        case ast.Expr() | ast.Raise() | ast.Delete() | ast.AugAssign() | ast.Continue() | ast.Break():
            return True
        case ast.Return(value=None):
            return True
        case ast.Assign(targets=[*targets]):
            return any(isinstance(one, ast.Attribute | ast.Subscript) for one in targets)
    return False


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _key(node: ast.expr) -> Edit:
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, str)
    return _replaced(node, repr(f"{node.value}?"))


def _replaced(node: _Located, new: str) -> Edit:
    return Edit(_start(node), _end(node), new)


def _start(node: _Located) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: _Located) -> tuple[int, int]:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset

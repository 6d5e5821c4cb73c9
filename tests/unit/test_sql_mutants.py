"""Mutants of SQL, in an .sql file and in the strings of a Python file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants.sql_mutants import sql_mutants

ROOT = Path(__file__).parents[2]


def changed(sql: str) -> list[str]:
    """Return the mutants of an .sql file with this text, without repeated blanks."""
    return [" ".join(mutant.text.split()) for mutant in sql_mutants("a.sql", sql)]


def test_a_condition_is_dropped_and_its_operators_change() -> None:
    assert changed("SELECT FROM t WHERE a <= :a AND b IS NULL") == [
        "SELECT FROM t WHERE b IS NULL",
        "SELECT FROM t WHERE a < :a AND b IS NULL",
        "SELECT FROM t WHERE a <= :a OR b IS NULL",
        "SELECT FROM t WHERE a <= :a",
        "SELECT FROM t WHERE a <= :a AND b IS NOT NULL",
    ]


def test_the_and_of_between_belongs_to_its_condition() -> None:
    assert changed("SELECT FROM t WHERE d NOT BETWEEN e AND f") == [
        "SELECT FROM t",
        "SELECT FROM t WHERE d BETWEEN e AND f",
    ]


def test_order_and_limit_are_dropped_and_columns_are_exchanged() -> None:
    assert changed("SELECT a, b FROM t ORDER BY a DESC LIMIT 1") == [
        "SELECT b, a FROM t ORDER BY a DESC LIMIT 1",
        "SELECT a, b FROM t LIMIT 1",
        "SELECT a, b FROM t ORDER BY a LIMIT 1",
        "SELECT a, b FROM t ORDER BY a DESC",
        "SELECT a, b FROM t ORDER BY a DESC LIMIT 2",
    ]


def test_the_clause_for_conflicts_is_dropped() -> None:
    assert changed("INSERT INTO t (a) SELECT c ON CONFLICT (a) DO NOTHING RETURNING a") == [
        "INSERT INTO t (a) SELECT c RETURNING a"
    ]


def test_each_constraint_of_a_table_is_dropped() -> None:
    table = "CREATE TABLE IF NOT EXISTS t (a int NOT NULL, b int DEFAULT now(), CONSTRAINT c UNIQUE (a, b));"
    assert changed(table) == [
        "CREATE TABLE IF NOT EXISTS t (a int , b int DEFAULT now(), CONSTRAINT c UNIQUE (a, b));",
        "CREATE TABLE IF NOT EXISTS t (a int NOT NULL, b int , CONSTRAINT c UNIQUE (a, b));",
        "CREATE TABLE IF NOT EXISTS t (a int NOT NULL, b int DEFAULT now() );",
        "CREATE TABLE IF NOT EXISTS t (a int NOT NULL, b int DEFAULT now(), CONSTRAINT c UNIQUE (b, a));",
    ]


def test_only_strings_of_sql_are_changed_in_a_python_file() -> None:
    source = '"""SELECT a FROM t WHERE b"""\nx = f"a <= :a {where()}"\nraise ValueError("b < :c AND")\ny = "z"\n'
    assert [(mutant.line, mutant.change) for mutant in sql_mutants("a.py", source)] == [(2, "<= becomes <")]


@pytest.mark.parametrize("path", ["consumers/db/inserts.py", "producers/outbox_deliveries.py"])
def test_each_mutant_of_a_python_file_can_be_parsed(path: str) -> None:
    for mutant in sql_mutants(path, (ROOT / path).read_text("utf-8")):
        ast.parse(mutant.text)

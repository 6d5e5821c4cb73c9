"""The program for mutation testing: its mutants of Python, its verdicts, and the explanations of survivors."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.documents import block
from tests.mutants.__main__ import parsed
from tests.mutants.explanations import Explanation, obsolete, read_explanations
from tests.mutants.mutant import Mutant, line_text
from tests.mutants.python_mutants import python_mutants
from tests.mutants.running import Result, files_of
from tests.mutants.targets import TARGETS
from tests.mutants.tree import ROOT

_EXAMPLE = '''\
"""A docstring with 1 < 2."""
LIMIT: int = 5


def send(entries: list[str], retry: bool = True) -> str:
    for entry in entries:
        if len(entry) <= LIMIT and not retry:
            log.warning("%d characters", len(entry) + 1)
            raise ValueError(f"ö {1 + 1}")
    try:
        queue.send(entries["ö"] + 'ö')
    except OSError:
        self.failures += 1
    return entries


PAUSE_SECONDS = 3
'''


def test_each_operator_constant_condition_and_statement_is_changed_once() -> None:
    found = [(mutant.line, mutant.change) for mutant in python_mutants("small.py", _EXAMPLE)]
    assert found == [
        (2, "5 becomes 6"),
        (5, "True becomes False"),
        (6, "entries becomes ()"),
        (7, "len(entry) <= LIMIT and not retry becomes False"),
        (7, "len(entry) <= LIMIT and not retry becomes True"),
        (7, "<= becomes <"),
        (7, "and becomes or"),
        (7, "removed not"),
        (9, 'removed raise ValueError(f"ö {1 + 1}")'),
        (11, "removed queue.send(entries[\"ö\"] + 'ö')"),
        (11, "\"ö\" becomes 'ö?'"),
        (11, "+ becomes -"),
        (12, "OSError becomes ()"),
        (13, "removed self.failures += 1"),
        (13, "+= becomes -="),
        (13, "1 becomes 2"),
        (14, "entries becomes None"),
    ]


def test_a_mutant_differs_from_the_source_in_its_change_only() -> None:
    texts = {mutant.change: mutant.text for mutant in python_mutants("small.py", _EXAMPLE)}
    assert texts["+ becomes -"] == _EXAMPLE.replace("\"ö\"] + 'ö'", "\"ö\"] - 'ö'")
    assert texts["removed self.failures += 1"] == _EXAMPLE.replace("self.failures += 1", "pass")
    assert texts["<= becomes <"] == _EXAMPLE.replace("<=", "<")


def test_equal_lines_of_a_file_are_numbered() -> None:
    """So an explanation is for one of them only."""
    text = "if a:\n    return\nif b:\n        return\n"
    assert [line_text(text, number) for number in range(1, 5)] == ["if a:", "return", "if b:", "return (2)"]


def test_equal_changes_of_a_line_are_numbered() -> None:
    changes = [mutant.change for mutant in python_mutants("small.py", "total = a + b + c\n")]
    assert changes == ["+ becomes -", "+ becomes - (2)"]


_SOURCE = """\
from functools import cache

STEP = 1


def count_to(last):
    total = 0
    while total < last:
        total += STEP
    return total


@cache
def limit():
    return 10 + 1


def unused():
    return 1 + 1
"""
_TESTS = """\
import pytest
from producers.counting import count_to, limit


def test_it_counts():
    assert count_to(3) == 3


@pytest.mark.parametrize("unequal", [-1, -2])
def test_the_limit_is_positive(unequal):
    assert limit() != unequal
"""
_RUN = """\
import json, sys
from pathlib import Path
from tests.mutants.running import mutants_of, run_target
from tests.mutants.targets import Target

root = Path(sys.argv[1])
target = Target(("producers/*.py",), ("tests/test_counting.py",), test_seconds=0.5)
results = run_target(target, mutants_of(target, root), root, 1, repr)
print(json.dumps([(one.line_text, one.mutant.change, one.verdict) for one in results]))
"""


def _project(root: Path, tests: str) -> subprocess.CompletedProcess[str]:
    for path, text in {"producers/counting.py": _SOURCE, "tests/test_counting.py": tests}.items():
        file = root / path
        file.parent.mkdir()
        file.write_text(text)
        (file.parent / "__init__.py").touch()
    return subprocess.run([sys.executable, "-c", _RUN, root], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_mutant_is_killed_by_a_failing_test_or_a_late_one_and_survives_otherwise(tmp_path: Path) -> None:
    run = _project(tmp_path, _TESTS)
    assert run.returncode == 0, run.stderr
    verdicts = {(line, change): verdict for line, change, verdict in json.loads(run.stdout)}
    assert verdicts[("STEP = 1", "1 becomes 2")] == "killed"
    assert verdicts[("return total", "total becomes None")] == "killed"
    assert verdicts[("total += STEP", "removed total += STEP")] == "timeout"
    assert verdicts[("total += STEP", "+= becomes -=")] == "timeout"
    assert verdicts[("return 10 + 1", "10 becomes 11")] == "survived"
    assert verdicts[("return 1 + 1", "+ becomes -")] == "not reached"
    assert (tmp_path / "producers/counting.py").read_text() == _SOURCE


def test_mutants_are_not_run_if_a_test_fails_without_them(tmp_path: Path) -> None:
    run = _project(tmp_path, _TESTS.replace("== 3", "== 4"))
    assert run.returncode == 1
    assert "the unmutated tests must pass first" in run.stderr


def _survivor(change: str) -> Result:
    return Result(Mutant("producers/small.py", 7, change, ""), "survived", "if a < b:", 1.0)


def test_an_explanation_that_matches_no_survivor_is_reported() -> None:
    explained = Explanation("producers/small.py", "if a < b:", "< becomes <=", "b is never equal to a")
    elsewhere = Explanation("producers/other.py", "if a < b:", "< becomes <=", "not in these files")
    of_other_lines = {("producers/small.py", "if b < c:", "< becomes <=")}
    assert obsolete([explained, elsewhere], [_survivor("< becomes <=")], set()) == []
    killed = replace(_survivor("< becomes <="), verdict="killed")
    assert obsolete([explained, elsewhere], [killed], of_other_lines) == [explained]
    assert obsolete([explained], [_survivor("a < b becomes True")], {killed.key}) == []


def test_an_explanation_may_cover_all_changes_of_a_line() -> None:
    whole = Explanation("producers/small.py", "if a < b:", "any", "a figure of tuning")
    assert all(whole.matches(_survivor(change).key) for change in ("< becomes <=", "a < b becomes True"))
    assert obsolete([whole], [_survivor("< becomes <=")], set()) == []


def test_each_explanation_has_a_reason_and_names_a_mutant_of_a_target() -> None:
    keys = set()
    for target in TARGETS.values():
        for path in files_of(target, ROOT):
            text = (ROOT / path).read_text("utf-8")
            keys |= {(path, line_text(text, one.line), one.change) for one in target.mutants_of(path, text)}
    assert [one for one in read_explanations() if not one.reason or not any(map(one.matches, keys))] == []


def test_the_documented_commands_name_targets_and_options() -> None:
    commands = [shlex.split(line) for line in block("tests/mutants/README.md", "mutants").splitlines()]
    assert {command[2] for command in commands} == {"tests.mutants"}
    assert [parsed(command[3:]).targets for command in commands] == [["contract"], ["relay"], ["contract"]]


def test_an_unknown_target_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(["contracts"])
    assert "no target is named contracts" in capsys.readouterr().err


def test_each_target_has_files_and_existing_tests() -> None:
    for name, target in TARGETS.items():
        assert files_of(target, ROOT), name
        assert all((ROOT / test.partition("::")[0]).is_file() for test in target.tests), name

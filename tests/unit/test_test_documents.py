"""tests/README.md, the documents of tests/benchmarks, and each command of a test program that any document names."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.benchmarks.__main__ import MEASURES
from tests.benchmarks.report import Report, figure_tables
from tests.benchmarks.throughput import CONTENDERS
from tests.documents import ROOT, block, documents, table, text_of

_COMMAND = re.compile(r"python -m (tests[\w.]*)([^`\n]*)")


@cache
def _source_of(program: str) -> str:
    """Return the source of a module, or of the `__main__` of a package; "" if there is none."""
    try:
        found = find_spec(program)
    except ModuleNotFoundError:
        return ""
    if found is None or found.origin is None:
        return ""
    file = Path(found.origin)
    return (file.with_name("__main__.py") if file.name == "__init__.py" else file).read_text("utf-8")


@cache
def _help_of(program: str) -> str:
    """Run the program in this process, which has already imported most of what it imports."""
    printed = StringIO()
    with (
        patch.object(sys, "argv", [program, "--help"]),
        redirect_stdout(printed),
        suppress(SystemExit),
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # the module may be imported already
    ):
        runpy.run_module(program, run_name="__main__")
    return printed.getvalue()


def _problems_of_command(program: str, words: Sequence[str]) -> list[str]:
    """Return one line for each option or name that the program does not have; values and placeholders are ignored."""
    source = _source_of(program)
    if not source:
        return [f"there is no program {program}"]
    helps = _help_of(program) if "argparse" in source else ""
    options, names = set(re.findall(r"--[\w-]+", helps)), set(re.findall(r"[a-z][a-z-]+", helps))
    found = []
    for before, word in zip(("", *words), words, strict=False):
        if word.startswith("--"):
            found += [] if word in options else [f"{program} has no option {word}"]
        elif re.fullmatch("[a-z][a-z-]+", word) and not before.startswith("--"):
            found += [] if word in names else [f"{program} has no {word}"]
    return found


def _problems_of(text: str) -> list[str]:
    """Return the problems of all commands of test programs in a text."""
    commands = [(program.rstrip("."), words.split()) for program, words in _COMMAND.findall(text)]
    return [problem for program, words in commands for problem in _problems_of_command(program, words)]


@pytest.mark.parametrize("document", documents())
def test_each_command_of_a_test_program_in_a_document_exists(document: str) -> None:
    assert _problems_of(text_of(document)) == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python -m tests.faults --hours 2", "tests.faults has no option --hours"),
        ("python -m tests.faults earthquake", "tests.faults has no earthquake"),
        ("`python -m tests.benchmarks throughput latencies`", "tests.benchmarks has no latencies"),
        ("python -m tests.no_such_program", "there is no program tests.no_such_program"),
        ("python -m tests.documents --all", "tests.documents has no option --all"),
    ],
)
def test_a_command_that_does_not_exist_is_reported(command: str, problem: str) -> None:
    assert _problems_of(command) == [problem]


def test_the_command_that_sets_up_and_tests_is_the_one_that_the_gate_runs() -> None:
    """.ci/run takes it from the top README.md."""
    lines = re.findall(r"^python3 -m venv .*pytest$", text_of("README.md"), re.M)
    assert block("tests/README.md", "set up and test").splitlines() == lines[:1]


def test_the_command_for_one_file_names_a_file_of_tests() -> None:
    *_, file = block("tests/README.md", "one file").split()
    assert (ROOT / file).is_file()


def test_the_classifiers_are_the_tested_versions_of_python() -> None:
    """The lowest is the one that the package requires, and this Python is one of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    sentence = text_of("tests/README.md").split("lists the tested ones:")[1].split(". To")[0]
    assert re.findall(r"3\.\d+", sentence) == versions
    assert project["requires-python"] == f">={versions[0]}"
    assert f"3.{sys.version_info.minor}" in versions


def test_the_command_for_another_python_sets_up_like_the_gate_and_names_tests() -> None:
    set_up, test = block("tests/README.md", "another Python").splitlines()
    environment = "/tmp/py313"
    assert f"{set_up.replace('python3.13', 'python3').replace(environment, '.venv')} && " in block(
        "tests/README.md", "set up and test"
    )
    program, *words = test.split()
    assert program == f"{environment}/bin/python"
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))


def test_the_code_blocks_have_commands_of_test_programs() -> None:
    blocks = [
        block("tests/README.md", "checks"),
        block("tests/README.md", "faults"),
        block("tests/README.md", "state machine"),
        block("tests/README.md", "fuzz"),
        block("tests/benchmarks/README.md", "run"),
    ]
    assert [len(_COMMAND.findall(one)) for one in blocks] == [3, 4, 2, 1, 2]


def test_the_lock_file_has_each_dependency() -> None:
    """The documented command writes the file with all extras."""
    command = block("tests/README.md", "lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.split(r"[\[<>=; ]", one)[0].lower() for one in needed} - {project["name"]}
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / command.split()[-1]).read_text("utf-8"), re.M))
    assert "--all-extras" in command
    assert {name.lower() for name in names} <= locked


def test_the_table_of_folders_has_each_folder_of_tests() -> None:
    found = {f"tests/{file.parent.name}" for file in (ROOT / "tests").glob("*/__init__.py")}
    assert {cells[0].strip("`") for cells in table("tests/README.md", "folders")} == found


def test_the_table_of_benchmarks_has_each_name_and_its_default_count() -> None:
    rows = table("tests/benchmarks/README.md", "benchmarks")
    assert {cells[0].strip("`"): int(cells[2].replace(",", "")) for cells in rows} == {
        name: count for name, (_, count) in MEASURES.items()
    }


def test_the_tables_of_figures_are_those_of_their_run() -> None:
    """It measured each benchmark that the document names, and throughput of each contender."""
    report = Report.read(ROOT / "tests/benchmarks/figures.json")
    _, tables = text_of("tests/benchmarks/FIGURES.md").split("<!-- figures -->\n")
    assert tables == figure_tables(report)

    measure, show = block("tests/benchmarks/FIGURES.md", "run").splitlines()
    names = [name for name in MEASURES if any(figure.benchmark == name for figure in report.figures)]
    assert measure == f".venv/bin/python -m tests.benchmarks {' '.join(names)} --json tests/benchmarks/figures.json"
    assert show == ".venv/bin/python -m tests.benchmarks --table tests/benchmarks/figures.json"
    assert CONTENDERS.keys() <= {figure.label for figure in report.figures if figure.benchmark == "throughput"}


def test_a_call_takes_about_a_millisecond_in_the_figures() -> None:
    """The documents say so. It is the median of the calls in each measurement of latency."""
    for document in ("README.md", "producers/README.md"):
        assert "about a millisecond" in " ".join(text_of(document).split())
    figures = Report.read(ROOT / "tests/benchmarks/figures.json").figures
    medians = {
        one.label: one.value for one in figures if one.label.endswith(": a call") and ", 10 a call" not in one.label
    }
    assert len(medians) == 9
    assert {label: value for label, value in medians.items() if not 0.4 <= value <= 2.0} == {}


def test_a_figure_is_shown_with_its_spread_or_its_quantiles_and_each_note() -> None:
    report = Report()
    report.add("record", "rate", "events/s", [1234.5, 1000.0, 2000.0])
    report.add("record", "share", "ratio", [0.123456])
    report.add_quantiles("latency", "1/s", [0.001, 0.002, 0.0035], "too slow")
    assert figure_tables(report).splitlines() == [
        "## record",
        "",
        "| figure | unit | median | minimum–maximum |",
        "|---|---|---|---|",
        "| rate | events/s | 1,234 | 1,000–2,000 |",
        "| share | ratio | 0.1235 | one run |",
        "",
        "## latency",
        "",
        "| milliseconds | p50 | p99 | max |",
        "|---|---|---|---|",
        "| 1/s | 2 | 3.5 | 3.5 |",
        "",
        "- latency, 1/s: too slow",
    ]


def _missing_tests(listed: list[tuple[str, str]]) -> list[str]:
    """Return the names that no test of their file has."""
    return [
        f"{name} in {file}"
        for name, file in listed
        if f"def test_{name.replace(' ', '_')}(" not in (ROOT / "tests" / file).read_text("utf-8")
    ]


def test_each_guarantee_of_the_readme_has_tests_and_each_listed_test_exists() -> None:
    guarantees = re.findall(r"^(\d\. (?:.+\n)+?)(?=\d\. |\n)", text_of("README.md").split("## Guarantees")[1], re.M)
    sections = re.split(r"^## ", text_of("tests/GUARANTEES.md"), flags=re.M)[1:]
    assert [section.split("\n")[0] for section in sections] == [" ".join(one.split()) for one in guarantees]
    for section in sections:
        listed = re.findall(r"^- \[(.*)\]\((.*)\)$", section, re.M)
        assert len(listed) > 3
        assert _missing_tests(listed) == []


_lists_of_promises = pytest.mark.parametrize("document", ["tests/PROMISES.md", "tests/CONSUMER_PROMISES.md"])


def _check_promises(lines: list[str], form: str, document: str = "") -> None:
    """Each line has this form: a promise, its document unless it is given, and its tests."""
    promises = [re.fullmatch(form, line) for line in lines if line]
    assert promises
    assert None not in promises
    for found in (one.groupdict() for one in promises if one):
        assert found["promise"] in " ".join(text_of(document or found["document"]).split())
        assert _missing_tests(re.findall(r"\[([^]]+)\]\(([^)]+)\)", found["tests"])) == []


@_lists_of_promises
def test_each_listed_promise_is_in_its_document_and_has_tests_that_exist(document: str) -> None:
    *sections, _ = re.split(r"^## ", text_of(document), flags=re.M)[1:]
    for section in sections:
        promising, *lines = section.strip().split("\n")
        _check_promises(lines, r'- "(?P<promise>.+)": (?P<tests>\[.+\))', promising)


@_lists_of_promises
def test_a_promise_that_is_shown_only_in_part_has_a_remark(document: str) -> None:
    """The last section has these promises; its lines name their documents."""
    title, *lines = re.split(r"^## ", text_of(document), flags=re.M)[-1].split("\n")
    assert title == "Shown only in part"
    _check_promises(lines, r'- "(?P<promise>.+)" in (?P<document>\S+): (?P<tests>\[.+\)|no test); .+')

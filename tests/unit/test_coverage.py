"""The gate's measurement of the branches that tests run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from coverage import CoverageData

from tests.documents import ROOT

_PROGRAM = """
import os
import subprocess
import sys

subprocess.run([sys.executable, "-c", "import producers.times"], check=True)
if not os.fork():
    from producers import json_logs
    os._exit(0)
os.wait()
"""
_VARIABLES = ("COVERAGE_PROCESS_START", "COVERAGE_FILE")


def test_child_processes_are_measured_in_any_folder(tmp_path: Path) -> None:
    """A child that is started, and one that is forked and ends without cleaning up. Each writes its own file."""
    values = (str(ROOT / "pyproject.toml"), str(tmp_path / "measured" / "data"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict(zip(_VARIABLES, values, strict=True))}
    subprocess.run([sys.executable, "-W", "error", "-c", _PROGRAM], check=True, cwd=tmp_path, env=environment)

    found = CoverageData(no_disk=True)
    for file in (tmp_path / "measured").iterdir():
        part = CoverageData(str(file))
        part.read()
        found.update(part)
    assert {str(ROOT / "producers" / name) for name in ("times.py", "json_logs.py")} <= found.measured_files()
    assert found.has_arcs()
    gate = (ROOT / ".ci/run").read_text("utf-8")
    assert [name for name in _VARIABLES if f"{name}=" not in gate] == []


def test_each_line_that_is_left_out_has_a_reason() -> None:
    """In its comment, or beside its pattern in pyproject.toml."""
    files = [file for package in ("producers", "consumers") for file in (ROOT / package).rglob("*.py")]
    comments = [found for file in files for found in re.findall(r"# pragma:.*", file.read_text("utf-8"))]
    assert [one for one in comments if not re.match(r"# pragma: no (cover|branch) - \w", one)] == []
    patterns = (ROOT / "pyproject.toml").read_text("utf-8").partition("exclude_also = [\n")[2].partition("]\n")[0]
    assert [one for one in patterns.splitlines() if "#" not in one] == []

"""Fuzz one target with atheris (`pip install atheris`), with a new PostgreSQL. Exit status 1: there are findings.

decode: events and jobs as a worker reads them. import: old history files. api: requests. FOLDER has the corpus, which
grows from run to run, and the findings: each defect once, as a reduced input and its traceback.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from consumers.embedded import servers
from tests.conftest import a_database, make_template
from tests.fuzz.invariants import TARGETS, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600, help="duration (default 600)")
    parser.add_argument(
        "--corpus", type=Path, metavar="FOLDER", help="default fuzz-TARGET in the folder for temporary files"
    )
    parser.add_argument(
        "--repeat", type=Path, nargs="+", metavar="FILE", help="check these inputs only, without atheris"
    )
    options = parser.parse_args()
    folder: Path = (options.corpus or Path(tempfile.gettempdir(), f"fuzz-{options.target}")).absolute()
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as home, servers(Path(home)) as addresses:
        make_template(addresses)
        with a_database(addresses) as url:
            os.environ["DATABASE_URL"] = url
            if options.repeat:
                return _repeat(options.target, [file.read_bytes() for file in options.repeat])
            command = [sys.executable, "-m", "tests.fuzz.fuzzer", options.target, str(folder), str(options.seconds)]
            ended = subprocess.run(command, check=False).returncode  # not 0 after a crash or a timeout
    found = sorted((folder / "findings").glob("*"))
    for file in found:
        print(file)
    return 1 if found or ended else 0


def _repeat(name: str, inputs: list[bytes]) -> int:
    found = failures((name, data) for data in inputs)
    print(*found, f"{len(inputs)} inputs, {len(found)} failures", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""`trading-history doctor`: one line a check, with what to do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from consumers.cli.options import AsJson
from consumers.terminal import print_checks, print_json


def doctor(
    history_dir: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Look here too for JSON files that are still written."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check settings, servers, queue, outbox and recording; exit status 1 if something is wrong."""
    from consumers.ops.doctor import diagnose
    from consumers.ops.doctor.json_files import DEFAULT_FOLDER

    folders = [DEFAULT_FOLDER] if history_dir is None else [DEFAULT_FOLDER, history_dir]
    checks = diagnose(folders)
    (print_json if as_json else print_checks)([asdict(check) for check in checks])
    raise typer.Exit(1 if any(check.status == "fail" for check in checks) else 0)

"""`trading-history doctor`: one line a check, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consumers.cli.options import AsJson
from consumers.terminal import print_checks, print_json

_DEFAULT_FOLDER = Path("data/history")


def doctor(
    history_dir: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Look here too for JSON files that are still written."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check settings, servers, queue, outbox and recording; exit status 1 if something is wrong."""
    from consumers.legacy.legacy_json import history_files
    from consumers.ops.doctor import diagnose

    folders = [_DEFAULT_FOLDER] if history_dir is None else [_DEFAULT_FOLDER, history_dir]
    facts = diagnose(lambda: [file for folder in folders for file in history_files(folder)])
    checks = [
        {
            "name": fact.name,
            "status": "warn" if fact.state == "unknown" else fact.state,
            "found": fact.found,
            "advice": fact.advice,
        }
        for fact in facts
    ]
    (print_json if as_json else print_checks)(checks)
    raise typer.Exit(1 if any(fact.state == "fail" for fact in facts) else 0)

"""The command `trading-history doctor`: one line per check, with advice."""

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
        typer.Option(
            exists=True,
            file_okay=False,
            help="Another folder to search for JSON files that an old controller still writes.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check settings, servers, queue, outbox and old JSON files; exit status 1 if a check fails.

    Example: trading-history doctor --history-dir data/history
    """
    from consumers.legacy.legacy_json import history_files
    from consumers.ops.doctor import diagnose

    folders = [_DEFAULT_FOLDER] if history_dir is None else [_DEFAULT_FOLDER, history_dir]
    found = diagnose(lambda: [file for folder in folders for file in history_files(folder)])
    checks = [
        {
            "name": one.name,
            "status": "warn" if one.state == "unknown" else one.state,
            "found": one.found,
            "advice": one.advice,
        }
        for one in found
    ]
    (print_json if as_json else print_checks)(checks)
    raise typer.Exit(1 if any(one.state == "fail" for one in found) else 0)

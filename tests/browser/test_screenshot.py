"""The picture of the history page in the documents."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.browser.screenshot import PICTURE, WIDTH, size_of
from tests.documents import ROOT, text_of

_MOST_BYTES = 100_000


def _require_small_picture(picture: Path) -> None:
    png = picture.read_bytes()
    width, height = size_of(png)
    assert width == WIDTH
    assert 1000 < height < 1600
    assert len(png) < _MOST_BYTES


def test_the_picture_is_small_and_linked() -> None:
    """README.md or the document of the page shows it."""
    _require_small_picture(PICTURE)
    links = {
        "README.md": f"]({PICTURE.relative_to(ROOT)})",
        "consumers/web/README.md": f"]({PICTURE.name})",
    }
    assert [document for document, link in links.items() if link in text_of(document)] != []


def test_the_program_takes_the_picture(tmp_path: Path) -> None:
    """The demo runs, and the page shows its charts without an error."""
    picture = tmp_path / "page.png"
    program = subprocess.run(
        [sys.executable, "-m", "tests.browser.screenshot", str(picture)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert program.returncode == 0, program.stderr
    _require_small_picture(picture)

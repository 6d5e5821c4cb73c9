"""Takes the picture of the history page that the documents show.

    python -m tests.browser.screenshot [FILE]

It starts embedded servers, runs the demo, opens the page in Chromium and writes a PNG with a palette. The data and the
times on the page are always the same, so the picture changes only with the page, the fonts or Chromium.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
import tempfile
import zlib
from base64 import b64decode, b64encode
from pathlib import Path

import numpy as np
from playwright.sync_api import expect, sync_playwright
from sqlalchemy import text

from consumers.db.engine import engine
from consumers.demo import run_demo
from consumers.embedded.child_processes import worker_process
from consumers.embedded.stack import embedded_stack
from consumers.web.api import create_app
from tests.documents import ROOT
from tests.page_app import serving

PICTURE = ROOT / "consumers" / "web" / "history-page.png"
WIDTH = 1100
_MARGIN = 16
_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# The demo stores months of snapshots within seconds: date the rows as a worker would have stored them day by day.
_DATE_ROWS = text("UPDATE portfolio_history SET created_at = \"timestamp\" + interval '400 ms'")

# Returns the pixels of a PNG, given as base64, as base64 of red, green, blue and alpha bytes.
_DECODE = """async (png) => {
    const image = await createImageBitmap(await (await fetch(`data:image/png;base64,${png}`)).blob());
    const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, image.width, image.height);
    let text = "";
    for (let at = 0; at < data.length; at += 32768) text += String.fromCharCode(...data.subarray(at, at + 32768));
    return btoa(text);
}"""


def take(picture: Path) -> None:
    """Write a picture of the page with the demo's data, down to the end of the charts."""
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        home = Path(folder)
        assert run_demo(home) == 0
        os.environ["HISTORY_OUTBOX"] = str(home / "outbox.db")
        with embedded_stack(home), worker_process(home / "worker.log"), serving(create_app()) as server:
            with engine().begin() as db:
                db.execute(_DATE_ROWS)
            picture.write_bytes(_picture_of(server.url))


def _picture_of(url: str) -> bytes:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--font-render-hinting=none", "--disable-lcd-text"]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        context = browser.new_context(
            viewport={"width": WIDTH, "height": 2000}, locale="en-GB", timezone_id="UTC", color_scheme="light"
        )
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#live")).to_have_text("Live")
        expect(page.locator("#drawn")).to_contain_text("91 snapshots in this range")
        expect(page.locator("#tiles")).to_contain_text("alive", timeout=30_000)
        expect(page.locator("#listing tbody > tr").first).to_be_visible()
        expect(page.locator("#banner")).to_be_hidden()
        curves = page.locator("#curves").bounding_box()
        assert curves is not None
        height = round(curves["y"] + curves["height"]) + _MARGIN
        taken = page.screenshot(animations="disabled", clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
        blank = context.new_page()  # the policy of the history page allows no data: addresses
        pixels = b64decode(blank.evaluate(_DECODE, b64encode(taken).decode()))
        browser.close()
    return with_palette(np.frombuffer(pixels, np.uint8).reshape(height, WIDTH, 4)[:, :, :3])


def with_palette(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """Return a PNG with at most 256 colors. Rarer colors become the nearest of the 256 most frequent ones."""
    height, width, _ = pixels.shape
    colors, inverse, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    kept = np.sort(np.argsort(-counts, kind="stable")[:256])
    palette = colors[kept]
    distances = ((colors[:, None, :].astype(np.int32) - palette[None, :, :].astype(np.int32)) ** 2).sum(axis=2)
    indices = distances.argmin(axis=1).astype(np.uint8)[inverse.reshape(-1)].reshape(height, width)
    lines = b"".join(b"\0" + line.tobytes() for line in indices)
    return _SIGNATURE + b"".join(
        _chunk(name, data)
        for name, data in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            (b"PLTE", palette.tobytes()),
            (b"IDAT", zlib.compress(lines, 9)),
            (b"IEND", b""),
        )
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def size_of(png: bytes) -> tuple[int, int]:
    """Return the width and the height of a PNG in pixels."""
    assert png.startswith(_SIGNATURE)
    width, height = struct.unpack(">II", png[16:24])
    return width, height


if __name__ == "__main__":
    take(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PICTURE)

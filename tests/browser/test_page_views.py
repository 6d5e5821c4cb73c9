"""The history page's views: several portfolios, performance, downloads, and the address that keeps a view."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import text

from consumers.db.engine import get_db
from tests.browser.conftest import OpenPage
from tests.browser.screenshot import size_of
from tests.browser.test_page import PHONE, _live, _violations
from tests.histories import START, store_amounts, store_values

_OLD_CONTROLLER = (
    ("10000", "0", "0", "10000"), ("9000", "1000", "100.5", "9100.5"), ("9000", "1000", "-50", "8950"),
    ("9000", "1000", "200", "9200"),
)  # fmt: skip


def _downloaded(page: Page, name: str) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=name).click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def test_what_is_shown_can_be_saved(open_page: OpenPage) -> None:
    """CSV has the drawn points with exact amounts and RFC 3339 times, PNG the chart with its title and background."""
    store_values([10_000, "9900.12345678", 10_100])
    page = open_page()
    _live(page)
    name, body = _downloaded(page, "Download the curve as CSV")
    assert name == "portfolio-1-value.csv"
    lines = body.decode().split("\r\n")
    assert lines[0] == "at,value"
    assert lines[2] == "2026-06-02T12:00:00+00:00,9900.12345678"
    assert len(lines) == 5
    _, days = _downloaded(page, "Download the days as CSV")
    assert "2026-06-02,9900.12345678,-99.87654322,1\r\n" in days.decode()
    page.get_by_role("button", name="one day").click()
    expect(page.locator("#drawn")).to_contain_text("2 snapshots in this range")
    assert len(_downloaded(page, "Download the curve as CSV")[1].decode().split("\r\n")) == 4
    name, png = _downloaded(page, "Download the drawdown as PNG")
    assert name == "portfolio-1-drawdown.png"
    width, height = size_of(png)
    assert width > 1000
    assert height == 150 + 30


def test_several_portfolios_are_compared_and_the_address_keeps_it(open_page: OpenPage) -> None:
    """From the first day that all of them have; back returns to the view before."""
    store_values([10_000, 11_000, 12_100])
    store_values([None, 50, 40], portfolio=2)
    store_values([1, -5, 7], portfolio=3)
    page = open_page()
    _live(page)
    expect(page.locator("#compare")).to_be_hidden()
    page.locator("#other-2").focus()
    page.keyboard.press("Space")
    expect(page.locator("#compare-legend li")).to_have_text(
        [re.compile(r"1 \(.*: 110.00"), re.compile(r"2 \(.*: 80.00")]
    )
    expect(page.locator("#compare-note")).to_contain_text("2 Jun 2026")
    assert "portfolio=1&portfolio=2" in page.url
    page.reload()
    _live(page)
    expect(page.locator("#compare-legend li")).to_have_count(2)
    assert b"2026-06-03,110.00000000000001,80\r\n" in _downloaded(page, "Download the comparison as CSV")[1]
    page.locator("#other-3").check()
    expect(page.locator("#compare-note")).to_contain_text(re.compile(r"Portfolio 3 \(value\) is left out.*2 Jun 2026"))
    expect(page.locator("#compare-legend li")).to_have_count(2)
    assert _violations(page) == []
    page.locator("#measure").select_option("profit_loss")
    expect(page.locator("#compare-note")).to_contain_text("Profit/loss cannot be rebased")
    page.go_back()
    expect(page.locator("#compare-legend li")).to_have_count(2)
    with get_db() as db:
        db.execute(text("DELETE FROM portfolio_history WHERE portfolio_id = 2"))
    page.reload()
    _live(page)
    expect(page.locator("#other-2")).to_have_count(0)


def test_an_address_with_an_unknown_portfolio_says_which_one_is_shown(open_page: OpenPage) -> None:
    store_values([10_000, 11_000])
    store_values([20_000], portfolio=2)
    page = open_page()
    _live(page)
    expect(page.locator("#portfolio-note")).to_have_text("")
    page.goto(page.url.split("?")[0] + "?portfolio=99")
    _live(page)
    expect(page.locator("#portfolio-note")).to_have_text("Portfolio 99 has no snapshots. Portfolio 1 is shown.")
    page.locator("#portfolio").select_option("2")
    expect(page.locator("#portfolio-note")).to_have_text("")


def test_the_address_keeps_the_range_and_back_returns_to_it(open_page: OpenPage) -> None:
    """Nonsense in the address is ignored."""
    store_values(range(100, 200))
    page = open_page()
    _live(page)
    page.get_by_role("button", name="one week").click()
    expect(page.locator("#drawn")).to_contain_text("8 snapshots in this range")
    assert "range=1W" in page.url
    page.get_by_role("button", name="Zoom out").click()
    expect(page.locator("#drawn")).not_to_contain_text("8 snapshots in this range")
    assert "since=2026-" in page.url
    drawn = page.locator("#drawn").inner_text()
    page.reload()
    expect(page.locator("#drawn")).to_have_text(drawn)
    page.go_back()
    expect(page.locator("#drawn")).to_contain_text("8 snapshots in this range")
    expect(page.get_by_role("button", name="one week")).to_have_attribute("aria-pressed", "true")
    address = page.url.split("?")[0]
    for nonsense in (
        "?portfolio=%00x&portfolio=&measure=__proto__",
        "?range=toString",
        "?since=x&until=-1",
        "?since=2026-07-01&until=2026-06-01",
    ):
        page.goto(address + nonsense)
        _live(page)
        expect(page.locator("#drawn")).to_contain_text("100 snapshots in this range")


def test_the_drawdown_has_its_dates_in_words(open_page: OpenPage) -> None:
    """Peak, lowest and recovery of the deepest one in the range."""
    store_values([100, 200, 150, 120, 180, 210, 200])
    page = open_page()
    _live(page)
    expect(page.locator("#drawdown-note")).to_contain_text(
        "peak 2 Jun 2026, 14:00:00, lowest 4 Jun 2026, 14:00:00, recovered 6 Jun 2026, 14:00:00."
    )
    page.get_by_role("button", name="one day").click()
    expect(page.locator("#drawdown-note")).to_contain_text(
        "peak 6 Jun 2026, 14:00:00, lowest 7 Jun 2026, 14:00:00, not recovered"
    )


def test_performance_has_figures_and_a_heat_map_in_text(open_page: OpenPage) -> None:
    """A portfolio without figures gets the reason."""
    store_amounts(*_OLD_CONTROLLER)
    store_values([5], portfolio=2)
    page = open_page()
    _live(page)
    expect(page.locator("#performance-list")).to_contain_text(re.compile(r"Total return\s*2.00%"))
    expect(page.locator("#performance-list")).to_contain_text(
        re.compile("peak Tue, 2 Jun 2026, lowest Wed, 3 Jun 2026, recovered Thu, 4 Jun")
    )
    cells = page.locator("#heat tbody tr td")
    expect(page.locator("#heat tbody th")).to_have_text(["2026"])
    expect(cells).to_have_count(13)
    expect(cells.nth(5)).to_have_text("+2.00%")
    expect(cells.nth(5)).to_have_class("number gain heat-2")
    expect(cells.nth(12)).to_have_text("+2.00%")
    page.locator("#portfolio").select_option("2")
    expect(page.locator("#performance-note")).to_contain_text("No figures: ")
    expect(page.locator("#performance-figures")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["desk", "phone"])
def test_the_views_are_accessible_and_fit(open_page: OpenPage, scheme: str, device: str, tmp_path: Path) -> None:
    """With a comparison and a heat map."""
    store_amounts(*_OLD_CONTROLLER)
    store_values([50, 40, 60], portfolio=2, start=START)
    page = open_page(color_scheme=scheme, **(PHONE if device == "phone" else {}))
    _live(page)
    page.locator("#other-2").check()
    expect(page.locator("#compare-legend li")).to_have_count(2)
    expect(page.locator("#heat td").nth(5)).to_contain_text("%")
    page.screenshot(path=tmp_path / f"views-{device}-{scheme}.png", full_page=True)
    assert _violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("innerWidth")

"""The templates of the installed rq-dashboard, as they are rewritten."""

from __future__ import annotations

import re
from pathlib import Path

import rq_dashboard
from jinja2 import Environment

from consumers.web.dashboard import pages

THEIRS = Path(rq_dashboard.__file__).with_name("templates")
NAMES = sorted(str(path.relative_to(THEIRS)) for path in THEIRS.rglob("*.*"))


def _rewritten(name: str) -> str:
    loader = pages.loader()
    return loader.get_source(Environment(loader=loader, autoescape=True), name)[0]


def test_no_template_puts_text_into_a_page_as_html() -> None:
    """Not in the browser, and not on the server; and nothing is escaped twice."""
    assert len(NAMES) == 13
    for name in NAMES:
        source = _rewritten(name)
        assert "<%=" not in source, name
        assert ".html() %>" not in source, name
        assert [found for found in re.findall(r"{{(.*?)}}", source) if "safe" in found and "tojson" not in found] == []
        assert re.findall(r"""['"]{{[^}]*}}['"]""", re.sub(r"""\b[\w-]+="[^"]*\"""", "", source)) == [], name


def test_every_script_that_runs_has_the_nonce() -> None:
    """Those with an address may have none: they are our own server's."""
    for name in NAMES:
        for tag in re.findall("<script[^>]*>", _rewritten(name)):
            assert "nonce=" in tag or "src=" in tag or 'type="text/template"' in tag, (name, tag)


def test_each_rewriting_is_needed() -> None:
    """Another release may have mended it, or have it in other words."""
    sources = [(THEIRS / name).read_text("utf-8") for name in NAMES]
    assert [theirs for theirs, _ in pages._REWRITTEN if not any(theirs in source for source in sources)] == []
    assert any(pages._ESCAPED_ALREADY.search(source) for source in sources)

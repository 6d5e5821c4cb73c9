"""The templates of the installed rq-dashboard escape as our app expects, and our serializer reads any job for them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import rq_dashboard

from consumers.web.dashboard.json_only import JsonOnly

TEMPLATES = Path(rq_dashboard.__file__).with_name("templates")
SOURCES = {str(path.relative_to(TEMPLATES)): path.read_text("utf-8") for path in TEMPLATES.rglob("*.*")}


def test_templates_escape_where_the_settings_of_underscore_and_jinja_do_not() -> None:
    """Our setting for Underscore skips these expressions; Jinja skips values marked as safe."""
    assert len(SOURCES) == 13
    exceptions = [one for source in SOURCES.values() for one in re.findall(r"<%= \$\('<div/>'\)\.text\(.*", source)]
    assert len(exceptions) == 2
    for exception in exceptions:
        assert re.match(r"<%= \$\('<div/>'\)\.text\(d\.\w+\)\.html\(\) %></", exception)
    values = [value for source in SOURCES.values() for value in re.findall("{{(.*?)}}", source)]
    assert [value for value in values if "safe" in value and "tojson" not in value] == []


def test_the_setting_of_underscore_comes_before_every_template() -> None:
    """It is in the only inline script of a page, after Underscore itself."""
    assert SOURCES["rq_dashboard/inline_js.html"].startswith("var POLL_INTERVAL = {{ poll_interval }};\n")
    scripts = re.findall("<script.*?>", "".join(SOURCES.values()))
    running = [tag for tag in scripts if "text/template" not in tag and "src=" not in tag]
    assert running == ['<script type="text/javascript">']
    base = SOURCES["rq_dashboard/base.html"]
    assert base.index("underscore") < base.index("inline_js.html") < base.index("content_scripts")


@pytest.mark.parametrize("stored", [pickle.dumps(("f", None, (1,), {})), b"[" * 100_000, b"\xff", b"", b"9" * 5000])
def test_data_that_is_not_json_is_read_as_text_and_as_a_call_and_written_back_unchanged(stored: bytes) -> None:
    read = JsonOnly.loads(stored)
    function, instance, arguments, keywords = read
    assert read == f"({len(stored):,} bytes that are not JSON)" == function
    assert (instance, arguments, keywords) == (None, [], {})
    assert JsonOnly.dumps(read) == stored


def test_json_is_read_and_written_as_by_rq() -> None:
    value = ["f", None, ["ü"], {"a": 1}]
    assert JsonOnly.loads(JsonOnly.dumps(value)) == value

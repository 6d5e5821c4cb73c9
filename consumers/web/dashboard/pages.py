"""rq-dashboard's pages, made safe to show what anybody has written into Redis."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import rq_dashboard
from jinja2 import BaseLoader, ChoiceLoader, Environment, FileSystemLoader

_OURS = Path(__file__).with_name("templates")
_THEIRS = Path(rq_dashboard.__file__).with_name("templates")

# What stands where the buttons are.
_LOSS = (
    "Takes these jobs out of Redis. Producers with an outbox send again what they have not seen stored; what another"
    " program has enqueued, and no worker has read, is lost."
)
# As Underscore's templates have it, <%= puts text into a page as HTML, <%- as text. Where their pages escape by
# themselves they would do so twice.
_ESCAPED_ALREADY = re.compile(r"<%= \$\('<div/>'\)\.text\((.+?)\)\.html\(\) %>")
_REWRITTEN = (
    ("<%=", "<%-"),
    # A name in quotes inside a script, that may have quotes itself.
    ("'{{ queue.name }}'", "{{ queue.name|tojson }}"),
    # Only scripts with the answer's nonce run.
    ('<script type="text/javascript">', '<script nonce="{{ nonce }}">'),
    # What is no job is told as it is: an idle worker, or one with many jobs at hand.
    ("d.current_job !== 'idle'", "d.current_job.job_id"),
    ("<select {% if", '<select aria-label="Redis" {% if'),
    ("This list below contains", "This list contains"),
    ("all the queued jobs on queue", "the {{ registry_name }} jobs of queue"),
    ("Remove all jobs from this queue (<b>destructive</b>)", _LOSS),
    ("Select a queue from above to view all jobs currently pending on the queue.", "Select a number to see the jobs."),
)


class SafeLoader(FileSystemLoader):
    """Reads rq-dashboard's templates as they should be."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
        source, name, uptodate = super().get_source(environment, template)
        source = _ESCAPED_ALREADY.sub(r"<%- \1 %>", source)
        for theirs, safe in _REWRITTEN:
            source = source.replace(theirs, safe)
        return source, name, uptodate


def loader() -> BaseLoader:
    """Our own pages in place of some of theirs, and theirs made safe."""
    return ChoiceLoader([FileSystemLoader(_OURS), SafeLoader(_THEIRS)])

"""The Flask app: rq-dashboard's unchanged blueprint with one Redis client and a login."""

from __future__ import annotations

import logging
from typing import Any

from flask import Flask, Response, request
from flask.typing import ResponseReturnValue
from markupsafe import Markup
from redis import Redis, RedisError
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq_dashboard.web import blueprint
from werkzeug.exceptions import Conflict, HTTPException, InternalServerError, NotFound, ServiceUnavailable

from consumers.errors import first_line
from consumers.web.dashboard import login
from producers.redis_url import place_of

logger = logging.getLogger(__name__)

# Underscore builds the tables in the browser. It inserts <%= as HTML and <%- as text. This setting makes it insert both
# as text, except where a template of rq-dashboard escapes the value itself. It is appended to the only configuration
# value that the pages' script contains, `var POLL_INTERVAL = {{ poll_interval }};`, so it runs before the templates.
_POLL_INTERVAL = Markup(r"2500;  _.templateSettings.escape = /<%[-=](?! \$\('<div\/>'\)\.text\()([\s\S]+?)%>/g")

_READONLY_STYLE = """<style>
#compact-btn, #delete-job-btn, #empty-btn, #requeue-all-btn, #requeue-job-btn { display: none !important; }
#jobs th:last-child, #jobs td.actions { display: none; }
.navbar-brand::after { content: " (read-only)"; }
</style>"""


def create_app(guard: login.Guard, redis: Redis, queue_name: str) -> Flask:
    """Return the app; its page of jobs opens with `queue_name`. Call it once per process: the blueprint is a global."""
    app = Flask("rq_dashboard")
    app.jinja_env.autoescape = True  # Flask does not escape in .js templates, and the pages include their scripts
    app.config["RQ_DASHBOARD_REDIS_URL"] = [place_of(redis)]  # only displayed: it contains no password
    app.config["RQ_DASHBOARD_POLL_INTERVAL"] = _POLL_INTERVAL
    app.redis_conn = redis  # type: ignore[attr-defined]  # where rq-dashboard's views look for it
    blueprint.before_request_funcs.clear()  # they create a client per request, without timeouts
    guard.protect(app)
    app.register_error_handler(HTTPException, login.text_answer)
    app.register_error_handler(Exception, _failed)
    app.register_blueprint(blueprint)
    if guard.is_readonly:
        # RQ removes the ids of jobs and workers that no longer exist when it reads a list.
        for command in ("lrem", "srem"):
            setattr(redis, command, lambda *_: 0)
        app.after_request(_without_buttons)

    @app.url_value_preprocessor
    def name_queue(endpoint: str | None, values: dict[str, Any] | None) -> None:
        if endpoint == "rq_dashboard.jobs_overview" and values and values["queue_name"] is None:
            values["queue_name"] = queue_name  # RQ's default is a queue named "default"

    return app


def _without_buttons(page: Response) -> Response:
    """Hide the buttons of changes, and say that the dashboard is read-only."""
    if page.mimetype == "text/html":
        page.set_data(page.get_data(as_text=True).replace("</head>", f"{_READONLY_STYLE}</head>", 1))
    return page


def _failed(error: Exception) -> ResponseReturnValue:
    name = type(error).__name__
    if isinstance(error, NoSuchJobError):
        return login.text_answer(NotFound("The job is no longer in Redis."))
    if isinstance(error, InvalidJobOperation):
        return login.text_answer(Conflict("The job's state has changed. Reload the page."))
    if isinstance(error, RedisError):
        logger.warning("%s %s: Redis: %s: %s", request.method, request.path, name, first_line(error))
        return login.text_answer(ServiceUnavailable(f"Redis failed: {name}."))
    logger.error("%s %s failed", request.method, request.path, exc_info=error)
    return login.text_answer(
        InternalServerError(f"{name}. RQ may be unable to read a job in this list. See the server's log.")
    )

"""The Flask app: rq-dashboard's addresses, pages and script, over our own reading and changing."""

from __future__ import annotations

import logging
from typing import Any

from flask import Flask, request
from flask.typing import ResponseReturnValue
from redis import RedisError
from rq_dashboard.web import blueprint
from werkzeug.exceptions import HTTPException, InternalServerError, NotFound, ServiceUnavailable

from consumers.web.dashboard import login
from consumers.web.dashboard.pages import loader
from consumers.web.dashboard.stored_jobs import REGISTRIES
from consumers.web.dashboard.views import View, Views

logger = logging.getLogger(__name__)

MAX_PER_PAGE = 200  # what the page's own field allows


def create_app(protection: login.Guard, views: Views) -> Flask:
    """Once a process: rq-dashboard's blueprint is a global."""
    app = Flask("rq_dashboard")
    app.jinja_loader = loader()
    app.jinja_env.autoescape = True  # by itself Jinja does not in what is included as .js
    protection.protect(app)
    app.before_request(_check_address)
    app.register_error_handler(HTTPException, login.text_answer)
    app.register_error_handler(RedisError, _redis_is_away)
    app.register_error_handler(Exception, _defect)
    blueprint.before_request_funcs.clear()  # a connection of its own for each request, without a limit of time
    app.register_blueprint(blueprint)
    for name, view in views.by_endpoint().items():
        app.view_functions[f"rq_dashboard.{name}"] = _of_one_redis(view)
    return app


def _check_address() -> None:
    """What is out of the bounds of the pages' own fields is not found; their views would fail, or read for minutes."""
    parts = dict(request.view_args or {})
    try:
        numbers = {name: int(parts[name]) for name in ("per_page", "page") if name in parts}
    except ValueError:
        raise NotFound from None
    known = (
        parts.get("instance_number", 0) == 0
        and parts.get("registry_name", "queued") in {"queued", *REGISTRIES}
        and parts.get("order", "asc") in {"asc", "dsc"}
        and 1 <= numbers.get("per_page", 1) <= MAX_PER_PAGE
        and 1 <= numbers.get("page", 1) <= 10**9
    )
    if not known:
        raise NotFound


def _redis_is_away(error: Exception) -> ResponseReturnValue:
    logger.warning("cannot answer: Redis: %s", type(error).__name__)
    return login.text_answer(ServiceUnavailable(f"Redis does not answer: {type(error).__name__}."))


def _defect(error: Exception) -> ResponseReturnValue:
    logger.error("%s %s failed", request.method, request.path, exc_info=error)
    return login.text_answer(InternalServerError("This is a defect; the server's log has more."))


def _of_one_redis(view: View) -> View:
    """Their addresses begin with the number of a Redis; here there is one."""

    def answer(**parts: Any) -> ResponseReturnValue:
        parts.pop("instance_number", None)
        return view(**parts)

    return answer

"""Messages of the errors that a command expects: one line each."""

from __future__ import annotations

from redis import RedisError

from consumers.ops.redis_errors import redis_problem
from producers.errors import HistoryError
from producers.redis_keys import key_prefix_problem

_EXTRAS = {
    **dict.fromkeys(("sqlalchemy", "psycopg2", "prometheus_client"), "worker"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn"), "api"),
    "pyarrow": "parquet",
    **dict.fromkeys(("flask", "rq_dashboard", "six", "waitress", "werkzeug"), "dashboard"),
}


def error_message(error: Exception) -> str | None:
    """Return the message for an expected error, or None for a defect, which shows its traceback."""
    if isinstance(error, HistoryError):
        return error.with_advice()
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, RedisError):
        return f"Redis: {redis_problem(error)}"
    if isinstance(error, ValueError) and "RQ_KEY_PREFIX" in str(error):  # raised when RQ is imported
        return key_prefix_problem(error)
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        return (
            f"this command needs the extra [{extra}]: run pip install '.[{extra}]' in a clone of trading-history"
            if extra
            else None
        )
    return None

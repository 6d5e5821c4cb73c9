"""A view for each of rq-dashboard's addresses: its own unpickle, give up on harmed jobs, change things in passing."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

from flask import jsonify, render_template, url_for
from flask.typing import ResponseReturnValue
from redis import Redis
from rq.version import VERSION
from rq_dashboard.version import VERSION as DASHBOARD_VERSION
from rq_dashboard.web import pagination_window
from werkzeug.exceptions import Conflict, NotFound

from consumers.web.dashboard import changes
from consumers.web.dashboard.job_page import job_facts
from consumers.web.dashboard.stored_calls import line_of
from consumers.web.dashboard.stored_jobs import REGISTRIES, StoredJob, listed, read_job
from consumers.web.dashboard.stored_queues import queue_names, read_queues, read_workers

View = Callable[..., ResponseReturnValue]


class Views:
    """Of one Redis; `place` is what the pages call it, `queue_name` the queue that is shown first."""

    def __init__(self, redis: Redis, place: str, queue_name: str) -> None:
        self._redis = redis
        self._place = place
        self._queue_name = queue_name

    def by_endpoint(self) -> dict[str, View]:
        """By the names that rq-dashboard's blueprint has for them."""
        return {
            "queues_overview": lambda: self._page("queues", active_tab="queues"),
            "workers_overview": lambda: self._page("workers", active_tab="workers"),
            "jobs_overview": self.jobs_overview,
            "job_view": lambda job_id: self._page("job", id=job_id),
            "list_queues": self.list_queues,
            "list_workers": lambda: jsonify(workers=read_workers(self._redis)),
            "list_jobs": self.list_jobs,
            "job_info": self.job_info,
            "delete_job_view": self.delete_job,
            "requeue_job_view": self.requeue_job,
            "requeue_all": self.requeue_all,
            "empty_queue": self.empty_queue,
            "compact_queue": lambda queue_name: jsonify(status="OK", count=changes.compact(self._redis, queue_name)),
        }

    def jobs_overview(self, queue_name: str | None, **place: Any) -> ResponseReturnValue:
        names = [{"name": name} for name in queue_names(self._redis)]
        queue = {"name": queue_name or self._queue_name}
        return self._page("jobs", active_tab="jobs", queues=names, queue=queue, **place)

    def list_queues(self) -> ResponseReturnValue:
        """Each queue with its numbers, and where its lists are."""
        queues: list[dict[str, Any]] = []
        for name, counts in read_queues(self._redis):
            facts: dict[str, Any] = {
                "name": name,
                "count": counts["queued"],
                "queued_url": _list_url(name, "queued", 8),
            }
            for registry_name in REGISTRIES:
                facts[f"{registry_name}_job_registry_count"] = counts[registry_name]
                facts[f"{registry_name}_url"] = _list_url(name, registry_name, 8)
            queues.append(facts)
        return jsonify(queues=queues)

    def list_jobs(
        self, queue_name: str, registry_name: str, per_page: str, order: str, page: str
    ) -> ResponseReturnValue:
        size, current = int(per_page), int(page)
        total, jobs = listed(
            self._redis, queue_name, registry_name, offset=(current - 1) * size, count=size, newest_first=order == "dsc"
        )
        pages = ceil(total / size)

        def at(number: int) -> dict[str, str]:
            return {"url": _list_url(queue_name, registry_name, size, order, number)}

        pagination = {
            "current_page": current,
            "num_pages": pages,
            "pages_in_window": [{"number": one} | at(one) for one in pagination_window(total, current, size)],
            "first_page": at(1),
            "last_page": at(max(pages, 1)),
        }
        if current > 1:
            pagination["prev_page"] = at(current - 1)
        if current < pages:
            pagination["next_page"] = at(current + 1)
        rows = [_row(job) for job in jobs]
        return jsonify(name=queue_name, registry_name=registry_name, jobs=rows, pagination=pagination)

    def job_info(self, job_id: str) -> ResponseReturnValue:
        job = read_job(self._redis, job_id)
        if not job.exists:
            raise NotFound(f"Redis has no job {job_id} any more.")
        return jsonify(job_facts(job))

    def delete_job(self, job_id: str) -> ResponseReturnValue:
        changes.delete(self._redis, job_id)
        return jsonify(status="OK")

    def requeue_job(self, job_id: str) -> ResponseReturnValue:
        try:
            changes.requeue(self._redis, job_id)
        except changes.NotRequeued as error:
            raise Conflict(str(error)) from error
        return jsonify(status="OK")

    def requeue_all(self, queue_name: str) -> ResponseReturnValue:
        went, failed = changes.requeue_all(self._redis, queue_name)
        if failed:
            raise Conflict(f"{went} sent through again; {failed} cannot be read, the server's log names them.")
        return jsonify(status="OK", count=went)

    def empty_queue(self, queue_name: str, registry_name: str) -> ResponseReturnValue:
        changes.empty(self._redis, queue_name, registry_name)
        return jsonify(status="OK")

    def _page(self, name: str, **values: Any) -> str:
        return render_template(
            f"rq_dashboard/{name}.html",
            current_instance=0,
            instance_list=[self._place],
            rq_url_prefix=url_for("rq_dashboard.queues_overview"),
            rq_dashboard_version=DASHBOARD_VERSION,
            rq_version=VERSION,
            enable_delete=True,
            **values,
        )


def _list_url(queue_name: str, registry_name: str, per_page: int, order: str = "asc", page: int = 1) -> str:
    return url_for(
        "rq_dashboard.jobs_overview",
        instance_number=0,
        queue_name=queue_name,
        registry_name=registry_name,
        per_page=per_page,
        order=order,
        page=page,
    )


def _row(job: StoredJob) -> dict[str, Any]:
    """As the list's script wants it; a job with `exc_info` gets a button to requeue it."""
    return {
        "id": job.id,
        "description": line_of(job),
        "exc_info": job.reason,
        "created_at": job.text("created_at") or "",
        "ended_at": job.text("ended_at") or "",
    }

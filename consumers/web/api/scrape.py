"""/metrics: the pipeline's state for Prometheus. Each worker exports its own counters."""

from __future__ import annotations

import os
from functools import cache
from typing import Annotated

from fastapi import APIRouter, Header
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

from consumers.ops.exposition import pipeline_registry
from consumers.web.api.problems import ProblemRoute

metrics = APIRouter(include_in_schema=False, route_class=ProblemRoute)


@cache
def _registry() -> CollectorRegistry:
    return pipeline_registry()


# In a forked child, a lock that another thread of the parent had taken stays locked for ever.
os.register_at_fork(after_in_child=_registry.cache_clear)


@metrics.get("/metrics")
def scrape(accept: Annotated[str, Header()] = "") -> Response:
    """Return the metrics in the Prometheus text format, or in OpenMetrics if the client accepts it."""
    encode, content_type = choose_encoder(accept)
    return Response(encode(_registry()), headers={"Content-Type": content_type, "Cache-Control": "no-store"})

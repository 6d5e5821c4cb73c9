"""The API compared with its OpenAPI document: schemathesis sends valid and invalid requests."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.openapi.loaders import from_asgi
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from consumers.operations import insert_portfolio_history_snapshot, insert_signal_archive
from consumers.web.api import create_app
from tests.factories import INSTANT, a_signal

_NUMBERS = ("balance", "total_invested", "total_profit_loss", "total_value", "open_positions", "trade_count")


_document = from_asgi("/openapi.json", create_app())  # not the shared app: schemathesis keeps it running for a while


@pytest.fixture
def some_rows(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTORY_API_TOKEN", "right")
    for number in range(3):
        moment = INSTANT + timedelta(hours=number)
        insert_portfolio_history_snapshot({"timestamp": moment, **dict.fromkeys(_NUMBERS, number)})
        insert_signal_archive({"archived_at": moment, "signals": [a_signal()]})


@_document.parametrize()
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@pytest.mark.usefixtures("some_rows")
def test_the_api_answers_as_the_document_describes(case: schemathesis.Case[Any]) -> None:
    """Statuses, media types, headers and bodies are as described; no request fails, and each one needs the token."""
    # The document cannot describe which texts are valid cursors.
    excluded: list[Any] = [positive_data_acceptance] if "cursor" in (case.query or {}) else []
    headers = {"Authorization": "Bearer right"}
    answer = case.call(headers=headers)
    if answer.status_code == 414:  # a rejection too, which the check does not know
        excluded.append(negative_data_rejection)
    case.validate_response(answer, excluded_checks=excluded, headers=headers)

"""Requests that schemathesis makes from the server's own description: none of them breaks it, and all are answered as
the description says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.server.live import Live

schemathesis: Any = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed: pip install schemathesis"
)
checks: Any = pytest.importorskip("schemathesis.checks")
specs: Any = pytest.importorskip("schemathesis.specs.openapi.checks")

KEPT = (
    checks.not_a_server_error,
    specs.status_code_conformance,
    specs.content_type_conformance,
    specs.response_schema_conformance,
    specs.negative_data_rejection,
)


@pytest.fixture
def description(live: Live) -> Any:
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("description")


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_breaks_it(case: Any) -> None:
    answer = case.call(timeout=60)
    case.validate_response(answer, checks=KEPT)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

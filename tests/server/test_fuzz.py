"""Requests that schemathesis makes from the server's own description, as it should be and otherwise: none of them
breaks it, and all are answered as the description says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.server.live import Live

schemathesis: Any = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed: pip install schemathesis"
)
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", PATHS)
def test_nothing_breaks_it(live: Live, path: str, mode: str) -> None:
    description = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    cases = description[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def check(case: Any) -> None:
        answer = case.call(timeout=60)
        assert answer.status_code in (200, 400, 404, 405, 413, 415), answer.text
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    check()
    assert live.client.get("/health").status_code == 200

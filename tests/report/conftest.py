"""The made-up study, plain and with hostile text in every place where a user, a model or a file could put it."""

from __future__ import annotations

from typing import Any

import pytest

from assay.spec.result import Result
from tests.report.synthetic import tour

HOSTILE = (
    "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"
    '<b>b</b><a href="https://attacker.example">a</a>"%{pwned}{{7*7}}&lt;\u2028]]>'
)
CLOSED_WORDS = {"verdict", "outcome", "what"}
NAMED_BY_USERS = {"changes", "constraints"}


@pytest.fixture(scope="session")
def plain() -> list[Result]:
    return tour()


@pytest.fixture(scope="session")
def hostile(plain: list[Result]) -> list[Result]:
    return [poison(result) for result in plain]


def poison(result: Result) -> Result:
    """The same Result with HOSTILE before every text that is not one of the schema's own words."""
    envelope = {name: getattr(result, name) for name in ("study", "arm", "spec_digest", "recipe_digest", "version")}
    update: dict[str, Any] = {name: HOSTILE + text for name, text in envelope.items() if text is not None}
    values = poisoned(result.values, keys=result.kind == "environment")
    return result.model_copy(update={**update, "commit": HOSTILE, "device": HOSTILE, "values": values})


def poisoned(value: Any, keys: bool = False) -> Any:
    if isinstance(value, str):
        return HOSTILE + value
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, dict):
        return {
            (HOSTILE + key if keys else key): item if key in CLOSED_WORDS else poisoned(item, key in NAMED_BY_USERS)
            for key, item in value.items()
        }
    return value

"""Requests: what is refused, by name, and what two ways of writing one mean."""

from __future__ import annotations

import json

import pytest

from assay.engine.request import Grammar, GrammarLimits, Request, SamplingParams, Serving


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 17),
        ("logprobs", 21),
        ("logprobs", -1),
        ("min_new", -1),
        ("min_new", 129),
        ("grammar", {}),
        ("grammar", {"regex": "a", "json_object": True}),
        ("grammar", {"lark": "start: x"}),
        ("grammar", {"choice": ["a", ""]}),
        ("grammar", {"json_schema": "{"}),
        ("grammar", {"json_schema": [1]}),
        ("grammar", {"json_schema": {"const": "\ud800"}}),
        ("grammar", {"json_schema": {"type": "object", "x-guidance": {"lenient": True}}}),
        ("serving", {"deadline_s": 0}),
        ("serving", {"deadline_s": float("nan")}),
        ("serving", {"tenant": 3}),
        ("serving", {"user": "x"}),
        ("stop", ("",)),
        ("colour", 1),
    ],
)
def test_a_request_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Request(prompt=(1,), **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [{1: 101}, {1: float("nan")}, {-1: 1}, {"x": 1}, [(1, 1.0), (1, 2.0)]])
def test_biases_out_of_range_are_refused_by_name(bias: object) -> None:
    with pytest.raises(ValueError, match="logit_bias"):
        SamplingParams(logit_bias=bias)  # type: ignore[arg-type]


def test_ways_of_writing_the_same_thing_are_equal() -> None:
    schema = {"type": "object", "properties": {"é": {"const": 1}}}
    assert Grammar(json_schema=schema) == Grammar(json_schema=json.dumps(schema))  # type: ignore[arg-type]
    listed, mapped = SamplingParams(logit_bias=((5, 1.0),)), SamplingParams(logit_bias={"5": 1})  # type: ignore[arg-type, dict-item]
    assert listed == mapped and hash(listed) == hash(mapped)


def test_a_request_survives_json() -> None:
    asked = Request(
        prompt=(1, 2),
        sampling=SamplingParams(logit_bias=((5, 1.0),), seed=3),
        grammar=Grammar(choice=("a", "b")),
        serving=Serving(priority=2, deadline_s=1.5, tenant="t"),
        n=3,
    )
    assert Request.model_validate_json(asked.model_dump_json()) == asked
    assert GrammarLimits.model_validate(GrammarLimits(kept=2).model_dump()) == GrammarLimits(kept=2)

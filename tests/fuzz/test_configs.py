"""Configurations of every family with values changed to anything JSON holds are read or refused, soon and in little
memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assay.hub.config import MOST, is_number
from assay.hub.family import families, read
from assay.hub.load import Source, planned

PEAK, SECONDS = 100_000_000, 30.0
"""Bytes and seconds of the processor that a configuration may take: ten thousand layers are checked one by one."""
NUMBERS = (0, 1, -1, 3, 255, 10_001, (1 << 31) - 1, 1 << 31, 1 << 64, 10**30, 10**400, 0.5, -1.0, 1e-300, 1e300)
WORDS: tuple[Any, ...] = (True, False, None, "", "x", "sliding_attention")
OTHERS: tuple[Any, ...] = (float("inf"), float("nan"), [], [1], ["x"], [[]], {}, {"a": 1})
KINDS: tuple[Any, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional", [], 7)
RULES = tuple(
    {"rope_type": kind, "rope_theta": theta, "factor": factor}
    for kind in KINDS
    for theta, factor in ((1e4, 0), ("x", 2.0), (10**400, 2.0), (1e4, None))
)
TABLES = ({"full_attention": {}, "sliding_attention": 0}, {"full_attention": RULES[5], "sliding_attention": RULES[0]})
VALUES = (*NUMBERS, *WORDS, *OTHERS, *RULES, *TABLES)
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
Place = tuple[str, ...]


@cache
def written(kind: str) -> str:
    """The family's default configuration as transformers writes it, without towers that see and hear."""
    values = transformers.AutoConfig.for_model(kind).to_dict()
    found = {k: v for k, v in values.items() if k not in ("vision_config", "audio_config")}
    inner = found.get("text_config", found)
    inner |= {key: 6 for key in LAYERS if inner.get(key) is not None}
    inner |= {key: inner[key][:6] for key in LISTS if isinstance(inner.get(key), list)}
    if kind == "glm4_moe":
        inner["head_dim"] = 128  # as in every file; the default leaves half of an odd number of pairs
    return json.dumps(found)


def places(tree: Any, above: Place = ()) -> Iterator[Place]:
    """Every key of a tree, with those above it."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield (*above, key)
        yield from places(value, (*above, key))


def put(tree: dict[str, Any], place: Place, value: Any) -> None:
    """Nothing, where what was above the key is a mapping no more."""
    for key in place[:-1]:
        inner = tree.get(key)
        if not isinstance(inner, dict):
            return
        tree = inner
    tree[place[-1]] = value


def holds(values: dict[str, Any]) -> bool:
    """Whether a configuration is read; anything it raises but a ValueError is passed on."""
    began = time.process_time()
    tracemalloc.start()
    try:
        read(values)
        return True
    except ValueError:
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < PEAK and time.process_time() - began < SECONDS


def look(kind: str, examples: int) -> None:
    all_places = list(places(json.loads(written(kind))))
    change = st.tuples(st.sampled_from(all_places), st.sampled_from(VALUES))

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(change, min_size=1, max_size=3))
    def each(changes: list[tuple[Place, Any]]) -> None:
        values = json.loads(written(kind))
        for place, value in changes:
            put(values, place, json.loads(json.dumps(value)))
        values["model_type"] = kind
        holds(values)

    each()


@pytest.mark.parametrize("kind", families())
def test_changed_configurations_are_read_or_refused(kind: str) -> None:
    look(kind, 15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", families())
def test_many_changed_configurations_are_read_or_refused(kind: str) -> None:
    look(kind, 200)


@pytest.mark.parametrize("kind", families())
def test_counts_are_capped_before_anything_is_listed(kind: str) -> None:
    values = json.loads(written(kind))
    assert holds(values)
    refused = set()
    for place in (place for place in places(values) if place[-1] in MOST):
        changed = json.loads(written(kind))
        for key in LISTS:
            put(changed, (*place[:-1], key), None)
        put(changed, place, (1 << 31) - 1)
        try:
            holds(changed)
            read(changed)
        except ValueError as error:
            assert f"{place[-1]}: 2147483647; an integer from 1 to {MOST[place[-1]]} is expected" in str(error)
            refused.add(place[-1])
    counted = {place[-1] for place in places(values)} & set(LAYERS)
    assert refused & counted or not counted, "Nemotron-H lists its layers and says no number of them"


@pytest.mark.parametrize("odd", [0.5, [], {}, True, None])
def test_kinds_of_layers_that_are_no_strings_are_refused(odd: Any) -> None:
    """One of another type among them; of every family that lists them."""
    for kind in families():
        values = json.loads(written(kind))
        for place in (place for place in places(values) if place[-1] in ("layer_types", "mlp_layer_types")):
            changed = json.loads(written(kind))
            above = changed["text_config"] if len(place) > 1 else changed
            if isinstance(above[place[-1]], list):
                above[place[-1]][0] = odd
                assert not holds(changed), (kind, place)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_more_heads_than_numbers_to_share_are_refused(kind: str) -> None:
    values = {**json.loads(written(kind)), "num_attention_heads": 10**6, "head_dim": None}
    with pytest.raises(ValueError, match=r"num_attention_heads: 1000000; at most hidden_size \(\d+\) is accepted"):
        read(values)


@dataclass(frozen=True)
class Nothing:
    """A checkpoint without a tensor."""

    where: str = "a folder"
    names: frozenset[str] = frozenset()


@pytest.mark.parametrize(("kind", "experts"), [("llama", None), ("qwen3_moe", 65_536)])
def test_tensors_that_are_missing_are_listed_in_time(kind: str, experts: int | None) -> None:
    """A thousand layers as quickly as their number promises; millions of experts not to their end."""
    values = {**json.loads(written(kind)), "num_hidden_layers": 1000, "layer_types": None, "num_experts": experts}
    found, began = read(values), time.process_time()
    with pytest.raises(ValueError, match="or more tensors are missing" if experts else "9003 tensors are missing"):
        planned(Source(found.spec, found.family, (), cast(Any, Nothing())))
    assert time.process_time() - began < SECONDS / 2


@pytest.mark.parametrize("value", [True, "1", None, [], float("nan"), float("inf"), 10**400, -(10**400), 1e39])
def test_what_float32_does_not_hold_is_no_number(value: Any) -> None:
    assert not is_number(value)
    assert is_number(0) and is_number(-1e38) and is_number(1e-300)

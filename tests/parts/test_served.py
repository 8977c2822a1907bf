"""Positions and blocks in the engine's steps: chunks of prompts beside single tokens, as each sequence alone."""

from __future__ import annotations

from typing import Any

import pytest

from assay.model.lm import build
from tests.engine.test_pieces import same
from tests.model.small import spec
from tests.parts.test_blocks import HYPER, NGPT, UNITS, VALUES

ATTENTION = {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "p"}
SCHEMES: dict[str, dict[str, Any]] = {
    "shaw": {"kind": "shaw", "head_dim": 4, "reach": 5},
    "transformer_xl": {"kind": "transformer_xl", "heads": 4, "head_dim": 4},
    "kerple": {"kind": "kerple", "heads": 4},
    "fire": {"kind": "fire", "heads": 4, "length": 4},
}


@pytest.mark.parametrize("kind", SCHEMES)
def test_positions(kind: str) -> None:
    mixer = ATTENTION | {"sees": {"window": 3}}
    same(build(spec({"mixer": mixer}, positions={"p": SCHEMES[kind]}, init={"std": 0.5})))


@pytest.mark.parametrize(
    ("block", "more"),
    [
        ({"mixer": {"kind": "cope", "heads": 4, "limit": 4}}, {"positions": {}}),
        ({"mixer": ATTENTION | {"kind": "relative_values", "reach": 4}}, {"positions": {"p": SCHEMES["shaw"]}}),
        (VALUES | HYPER, {}),
        (UNITS, NGPT),
        ({"ffn": {"kind": "product_keys", "keys": 5, "top": 3, "key_dim": 8}, "norm": {"kind": "dyt"}}, {}),
    ],
    ids=["cope", "relative_values", "values-hyper", "ngpt", "product_keys-dyt"],
)
def test_blocks(block: dict[str, Any], more: dict[str, Any]) -> None:
    same(build(spec(block, init={"std": 0.5}, **more)))

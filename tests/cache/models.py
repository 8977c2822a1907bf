"""Small float64 models for tests of the stores, and steps over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from assay.cache import Cache, Size, Slot
from assay.model.lm import LM, build, state_table
from assay.ops.step import Step, rows_step
from assay.spec.load import validate
from assay.spec.model import ModelSpec

VOCAB = 19
WINDOW = 5
POSITIONS: Mapping[str, dict[str, Any] | None] = {
    "none": None,
    "rope": {"kind": "rope"},
    "raw": {"kind": "rope", "turns": "read"},
    "learned": {"kind": "learned"},
    "alibi": {"kind": "alibi", "heads": 4},
}
SEES: Mapping[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": WINDOW},
    "chunk": {"chunk": WINDOW},
    "first": {"window": WINDOW, "first": 2},
}


def spec(layers: Sequence[str], position: str = "rope", **mixer: Any) -> ModelSpec:
    """A model whose layers are named by what they see (`full`, `window`, ...), or `linear`."""
    scheme = POSITIONS[position]
    blocks: dict[str, Any] = {}
    for kind in dict.fromkeys(layers):
        attention = {"kind": "gqa", "heads": 4, "kv_heads": 2, "sees": SEES.get(kind), **mixer}
        attention |= {"position": "p"} if scheme else {}
        inner = {"kind": "linear", "heads": 2} if kind == "linear" else attention
        blocks[kind] = {"mixer": inner, "ffn": {"kind": "gated", "width": 24}}
    tree = {
        "d_model": 16,
        "vocab": VOCAB,
        "layers": len(layers),
        "context": 64,
        "blocks": blocks,
        "pattern": list(layers),
        "positions": {"p": scheme} if scheme else {},
        "init": {"std": "fan_in", "embed": 1.0, "depth": False},
    }
    return validate(ModelSpec, tree, "test")


@cache
def model(layers: tuple[str, ...], position: str = "rope") -> LM:
    return build(spec(layers, position), seed=3).double().eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(lm: LM, ids: Tensor) -> Tensor:
    """[R, T, V] in one pass without a cache."""
    out = lm(rows_step(ids)).logits
    assert out is not None
    return out.view(*ids.shape, -1)


def opened(lm: LM, size: Size) -> tuple[Cache, list[Slot]]:
    made = Cache(state_table(lm.spec), size, torch.float64)
    return made, [made.open() for _ in range(size.rows)]


@torch.no_grad()
def run(lm: LM, store: Cache, slots: Sequence[Slot], step: Step) -> Tensor:
    out = lm(step, store.begin(slots, step)).logits
    store.check_integrity()
    assert out is not None
    return out


def feed(lm: LM, store: Cache, slots: Sequence[Slot], ids: Tensor) -> Tensor:
    """[R, T, V] for R slots of equal length."""
    past = store.length(slots[0])
    return run(lm, store, slots, rows_step(ids, past, horizon=64)).view(*ids.shape, -1)

"""Attention whose bits follow from the sequence alone: the same in float32 however it is cut, stored, accompanied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.cache import PageSize
from assay.cache.paged import Paged
from assay.ops.attend import Scores, attend, plan
from assay.ops.sees import Sees
from assay.ops.step import rows_step
from assay.parts.positions.alibi import slopes
from assay.spec.base import StateField

LENGTH, HEADS, GROUPS = 150, 4, 2  # more than one piece of 128 keys
SEES = {"full": Sees(), "window": Sees(window=21), "first": Sees(window=9, first=2)}


class Far:
    """A bias by distance, each head with a slope of its own."""

    def tile(self, scores: Tensor, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        away = (q_pos[..., :, None] - k_pos[..., None, :]).to(scores.dtype)  # with an axis of one head
        return scores - slopes(HEADS).to(scores.dtype)[:, None, None] * away


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 5.0, "sink": torch.linspace(-1, 1, HEADS)},
    "bias": {"bias": Far()},
}


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    with torch.inference_mode():
        yield
    torch.use_deterministic_algorithms(False)


def drawn(rows: int, heads: int, size: int, seed: int) -> Tensor:
    return torch.randn(rows, LENGTH, heads, size, generator=torch.Generator().manual_seed(seed))


def fed(sees: Sees, rule: Scores, size: int, chunks: list[int], page: int, rows: int = 1) -> Tensor:
    """The first sequence's outputs [LENGTH, H, K], beside others that differ, in chunks and pages."""
    fields = {"x": tuple(StateField(name, "token", (GROUPS, size), keep=sees.keep) for name in "kv")}
    cache = Paged(fields, PageSize(rows, page, rows * -(-LENGTH // page), max(chunks)), torch.float32)
    slots = [cache.open() for _ in range(rows)]
    q, k, v = (drawn(rows, heads, size, seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS)))
    q[0], k[0], v[0] = (drawn(1, t.shape[2], size, 9 + i)[0] for i, t in enumerate((q, k, v)))
    out, past = [], 0
    for count in chunks:
        step = rows_step(torch.zeros(rows, count, dtype=torch.long), past)
        state, part = cache.begin(slots, step)["x"], slice(past, past + count)
        view = state.append(step, k=k[:, part].flatten(0, 1), v=v[:, part].flatten(0, 1))
        mine = attend(q[:, part].flatten(0, 1), view, step, sees, rule, plan(step, view.layout, sees))
        out.append(mine.view(rows, count, HEADS, size)[0])
        past += count
    return torch.cat(out)


def oracle(sees: Sees, rule: Scores, size: int) -> Tensor:
    torch.use_deterministic_algorithms(False)
    whole = fed(sees, rule, size, [LENGTH], 16)
    torch.use_deterministic_algorithms(True)
    return whole


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize(
    ("rule", "size", "compiled"),
    [("plain", 32, True), ("softcap", 32, True), ("softcap", 32, False), ("plain", 6, False), ("bias", 6, False)],
)
def test_no_bit_depends_on_the_cut(
    request: pytest.FixtureRequest, sees: str, rule: str, size: int, compiled: bool
) -> None:
    used = request.getfixturevalue("used") if compiled else None
    seen, scores = SEES[sees], Scores(scale=size**-0.5, **RULES[rule])
    whole = fed(seen, scores, size, [LENGTH], 16)
    torch.testing.assert_close(whole, oracle(seen, scores, size), rtol=1e-4, atol=1e-5)
    for chunks, page, rows in (([61, 1, 1, 30, 57], 5, 1), ([1] * 140 + [10], 48, 1), ([40, 100, 10], 3, 3)):
        assert torch.equal(fed(seen, scores, size, chunks, page, rows), whole), (chunks[:3], page, rows)
    assert used is None or "attend" in used

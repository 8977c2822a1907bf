"""A text through pages gives what it gives through rows: bit for bit where both are read in the same order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.cache import Cache, Paged, PageSize, Size, Slot
from assay.engine.runner import right_padded
from assay.model.lm import LM, state_table
from tests.cache.models import SEES, feed, logits, model, run, tokens

CPU = torch.device("cpu")
# Pages, and the entries of a view of so many tokens: 64 or what whole pages of it hold.
VIEWS = {1: 64, 2: 64, 3: 63, 7: 63, 16: 64, 40: 40}


def paged(lm: LM, size: PageSize) -> Paged:
    return Paged(state_table(lm.spec), size, torch.float64)


def pages_for(tokens: int, page: int) -> int:
    return -(-tokens // page)


@pytest.mark.parametrize("page", VIEWS)
@pytest.mark.parametrize("kinds", [("full", "full"), ("full", "linear"), ("first", "full")])
def test_bit_for_bit_as_rows(kinds: tuple[str, ...], page: int) -> None:
    """Prefill, decodes and padded rows, in runs of pages and in scattered ones."""
    lm, view = model(kinds), VIEWS[page]
    stores = (
        Cache(state_table(lm.spec), Size(3, view, 9), torch.float64),
        paged(lm, PageSize(3, page, 3 * pages_for(view, page), 9)),
    )
    slots = [[store.open() for _ in range(3)] for store in stores]
    texts = [tokens(1, 40, seed)[0] for seed in range(3)]
    for counts in ([9, 0, 0], [5, 9, 1], [1, 1, 1], [0, 7, 2], [1, 1, 1], [9, 0, 9], [1, 0, 0], [0, 1, 0]):
        outs = []
        for store, own in zip(stores, slots, strict=True):
            busy = [i for i, n in enumerate(counts) if n]
            past = [store.length(own[i]) for i in busy]
            rows = [texts[i][p : p + counts[i]].tolist() for i, p in zip(busy, past, strict=True)]
            outs.append(run(lm, store, [own[i] for i in busy], right_padded(rows, past, [64] * len(rows), CPU)))
        assert torch.equal(*outs)


def test_one_sequence_is_read_without_a_copy() -> None:
    lm = model(("full",))
    store = paged(lm, PageSize(2, 4, 40, 9))
    first, other = store.open(), store.open()
    for count in (9, 1, 1):
        seen = views(lm, store, first, count)
        assert all(v.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for v, p in seen)
    views(lm, store, other, 3)
    feed(lm, store, [first], tokens(1, 9))
    assert all(v.untyped_storage().data_ptr() != p.untyped_storage().data_ptr() for v, p in views(lm, store, first, 1))


def views(lm: LM, store: Paged, slot: Slot, count: int) -> list[tuple[Tensor, Tensor]]:
    """What the layers of a step read, beside the stores they read it from."""
    found = []
    step = right_padded([[1] * count], [store.length(slot)], [64], CPU)
    states = store.begin([slot], step)
    for part in (part for part, kind in store.kinds.items() if kind is not None):
        new = {n: torch.zeros(count, *pool.shape[2:], dtype=pool.dtype) for n, pool in store.pools[part].items()}
        view = states[part].append(step, **new)
        found += [(view.dense(name), store.pools[part][name]) for name in new]
    return found


@given(
    kinds=st.lists(st.sampled_from([*SEES, "linear"]), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    page=st.integers(1, 9),
    seed=st.integers(0, 9),
)
@settings(max_examples=20)
def test_any_chunking_of_any_hybrid_on_pages(kinds: list[str], cuts: list[int], page: int, seed: int) -> None:
    lm, ids = model(tuple(kinds)), tokens(2, sum(cuts), seed)
    store = paged(lm, PageSize(2, page, 2 * pages_for(sum(cuts), page), max(cuts)))
    slots = [store.open(), store.open()]
    out = torch.cat([feed(lm, store, slots, piece) for piece in ids.split(cuts, 1)], 1)
    low = any(f.dtype == "float32" for fields in state_table(lm.spec).values() for f in fields)
    assert float((out - logits(lm, ids)).abs().max()) < (1e-4 if low else 1e-10)

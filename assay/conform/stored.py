"""The laws that involve memory: one pass, chunks and single tokens agree; going back is as if never gone forward."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.cache.cache import Cache
from assay.cache.paged import Paged
from assay.cache.size import PageSize, Size, predict
from assay.cache.store import Slot, Store
from assay.conform.cases import MEMORY, TIGHT, TOKENS, Case, close

LENGTH = 13
CHUNKINGS = ((13,), (1,) * 13, (5, 1, 1, 4, 2), (2, 8, 3), (9, 1, 1, 1, 1))
PAGED = ((2, 8, 3), (9, 1, 1, 1, 1))  # those that also go through pages, of three tokens


def open_cache(c: Case, rows: int, chunk: int, saves: int = 1) -> tuple[Cache, list[Slot]]:
    cache = Cache(c.fields, Size(rows, LENGTH, chunk, MEMORY, saves), torch.float64, c.device)
    return cache, [cache.open() for _ in range(rows)]


def open_pages(c: Case, rows: int, chunk: int) -> tuple[Paged, list[Slot]]:
    cache = Paged(c.fields, page_size(rows, chunk), torch.float64, c.device)
    return cache, [cache.open() for _ in range(rows)]


def page_size(rows: int, chunk: int) -> PageSize:
    return PageSize(rows, 3, rows * -(-LENGTH // 3), chunk, MEMORY, saves=2, tails=1, snapshots=1)


def feed(c: Case, cache: Store, slots: list[Slot], x: Tensor, past: int) -> Tensor:
    """Rows of new tokens [R, T, D] after `past` stored ones -> [R, T, D']."""
    rows, length, _ = x.shape
    step = c.step(rows, length, past)
    y = c.run(x.reshape(rows * length, -1), step, cache.begin(slots, step))
    cache.check_integrity()
    return y.view(rows, length, -1)


def law_chunking(c: Case) -> None:
    """Any chunking of prefill and decode on the stores equals one pass without memory (in evaluation mode)."""
    if c.slot not in TOKENS:
        return
    c.modules.eval()
    rows = 2
    x = c.noise((rows, LENGTH, c.site.d_in), 1)
    whole = c.run(x.view(rows * LENGTH, -1), c.step(rows, LENGTH)).view(rows, LENGTH, -1)
    for chunks in CHUNKINGS:
        stores: list[tuple[Store, list[Slot]]] = [open_cache(c, rows, max(chunks))]
        if chunks in PAGED and any(c.fields.values()):
            stores.append(open_pages(c, rows, max(chunks)))
        for store, slots in stores:
            past, pieces = 0, []
            for size in chunks:
                pieces.append(feed(c, store, slots, x[:, past : past + size], past))
                past += size
            close(torch.cat(pieces, 1), whole, f"chunks of {chunks} in a {type(store).__name__}", tolerance(c))


def tolerance(c: Case) -> float:
    """State declared in float32 is stored in float32, also under a float64 model."""
    low = any(f.dtype == "float32" for group in c.fields.values() for f in group)
    return 1e-5 if low else TIGHT


def law_rewind(c: Case) -> None:
    """Rewound to a length whose state is still there, the continuation is as if nothing had come after it."""
    if c.slot not in TOKENS:
        return
    c.modules.eval()
    x = c.noise((1, LENGTH, c.site.d_in), 1)
    cache, slots = open_cache(c, 1, 6, saves=LENGTH)
    feed(c, cache, slots, x[:, :6], 0)
    kept = cache.length(slots[0])
    for past in range(6, 9):
        feed(c, cache, slots, c.noise((1, 1, c.site.d_in), 50 + past), past)
    if cache.reach(slots[0], kept) != kept:
        cache, slots = open_cache(c, 1, LENGTH, saves=LENGTH)
        feed(c, cache, slots, x[:, :6], 0)
    cache.rewind(slots[0], kept)
    after = feed(c, cache, slots, x[:, 6:11], 6)
    fresh, others = open_cache(c, 1, LENGTH, saves=LENGTH)
    feed(c, fresh, others, x[:, :6], 0)
    close(after, feed(c, fresh, others, x[:, 6:11], 6), "after rewinding", TIGHT)


def law_state(c: Case) -> None:
    """Declared state bytes equal the bytes of the allocated tensors, headroom apart."""
    if not any(c.fields.values()):
        return
    size = Size(3, LENGTH, 4, MEMORY)
    cache = Cache(c.fields, size, torch.float64)
    told = predict(c.fields, size, "float64")
    assert cache.reserved_bytes() == told.reserved, f"{cache.reserved_bytes()} allocated, {told.reserved} declared"
    paged = Paged(c.fields, page_size(3, 4), torch.float64, c.device)
    told = predict(c.fields, page_size(3, 4), "float64")
    assert paged.reserved_bytes() == told.reserved, f"{paged.reserved_bytes()} in pages, {told.reserved} declared"
    single = predict(c.fields, Size(3, LENGTH, 1, MEMORY), "float64")
    assert single.headroom == 0, "a cache fed one token at a time needs no headroom"

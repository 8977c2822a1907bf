"""The laws that involve memory: one pass, chunks and single tokens agree; going back is as if never gone forward."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.cache.cache import Cache
from assay.cache.coded import Quantised
from assay.cache.formats import Formats
from assay.cache.paged import Paged
from assay.cache.size import PageSize, Size, predict
from assay.cache.store import Slot, Store
from assay.conform.cases import MEMORY, TIGHT, TOKENS, Case, Refusal, close

LENGTH = 13
CHUNKINGS = ((13,), (1,) * 13, (5, 1, 1, 4, 2), (2, 8, 3), (9, 1, 1, 1, 1))
PAGES = (1, 3, 4, LENGTH)  # tokens of a page
BITS = "int8/channel"
ROUGH = 0.1  # of the results' spread: what eight bits may cost on average


def open_cache(c: Case, rows: int, chunk: int, saves: int = 1) -> tuple[Cache, list[Slot]]:
    cache = Cache(c.fields, Size(rows, LENGTH, chunk, MEMORY, saves), torch.float64, c.device)
    return cache, [cache.open() for _ in range(rows)]


def page_size(rows: int, chunk: int, page: int = 3) -> PageSize:
    return PageSize(rows, page, rows * -(-LENGTH // page), chunk, MEMORY, saves=2, tails=2, snapshots=4)


def feed(c: Case, cache: Store, slots: list[Slot], x: Tensor, past: int, plain: bool = False) -> Tensor:
    """Rows of new tokens [R, T, D] after `past` stored ones -> [R, T, D']. plain: as a server does, which knows
    tokens by number and reads nothing both ways."""
    rows, length, _ = x.shape
    step = c.step(rows, length, past)
    if plain:
        step = step.with_(prefix=None, inputs={"ids": named(x).view(-1)})
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
        store, slots = open_cache(c, rows, max(chunks))
        past, pieces = 0, []
        for size in chunks:
            pieces.append(feed(c, store, slots, x[:, past : past + size], past))
            past += size
        close(torch.cat(pieces, 1), whole, f"chunks of {chunks}", tolerance(c))


def named(x: Tensor) -> Tensor:
    """[R, T, D] -> [R, T]: another number for another token."""
    return x.detach()[..., 0].mul(1e9).long().abs()


def fed(c: Case, store: Store, slots: list[Slot], x: Tensor, chunks: tuple[int, ...], past: int = 0) -> Tensor:
    """The outputs of chunks of [R, T, D], one after the other, each settled as a server does."""
    pieces = []
    for piece in x.split(chunks, 1):
        pieces.append(feed(c, store, slots, piece, past, plain=True))
        store.settle(slots)
        past += piece.shape[1]
    return torch.cat(pieces, 1)


def law_paging(c: Case) -> None:
    """Pages of any size give what rows give."""
    if c.slot not in TOKENS or not any(c.fields.values()):
        return
    c.modules.eval()
    x, chunks = c.noise((2, LENGTH, c.site.d_in), 1), (2, 8, 1, 2)
    rows = fed(c, *open_cache(c, 2, 8), x, chunks)
    for page in PAGES:
        cache = Paged(c.fields, page_size(2, 8, page), torch.float64, c.device)
        got = fed(c, cache, [cache.open(), cache.open()], x, chunks)
        close(got, rows, f"pages of {page}", TIGHT)


def law_prefix(c: Case) -> None:
    """A sequence that begins as another one goes on from what that one has stored, as if it had read it all."""
    if c.slot not in TOKENS or not any(c.fields.values()):
        return
    c.modules.eval()
    cache = Paged(c.fields, page_size(1, 8), torch.float64, c.device)
    if cache.entries:
        raise Refusal("what it stores depends on a memory, which the tokens do not tell")
    x, shared = c.noise((1, LENGTH, c.site.d_in), 1), 9
    x[:, shared:] = c.noise((1, LENGTH - shared, c.site.d_in), 2)
    first = cache.open()
    fed(c, cache, [first], c.noise((1, LENGTH, c.site.d_in), 1), (6, 3, 1, 3))
    cache.close(first)
    second = cache.open(named(x)[0].tolist())
    assert cache.length(second) == shared, f"{cache.length(second)} of {shared} stored tokens were used again"
    got = fed(c, cache, [second], x[:, shared:], (3, 1), shared)
    cold = fed(c, *open_cache(c, 1, 9), x, (9, 3, 1))
    close(got, cold[:, shared:], "behind a known beginning", tolerance(c))


def law_swap(c: Case) -> None:
    """Moved to the host and back, while another sequence used its place, a sequence goes on as if never moved."""
    if c.slot not in TOKENS or not any(c.fields.values()):
        return
    c.modules.eval()
    x = c.noise((1, LENGTH, c.site.d_in), 1)
    stay, cache = (Paged(c.fields, page_size(1, 8), torch.float64, c.device) for _ in range(2))
    whole = fed(c, stay, [stay.open()], x, (5, 2, 6))
    slot = cache.open()
    begun = fed(c, cache, [slot], x[:, :7], (5, 2))
    moved = cache.swap_out(slot)
    other = cache.open()
    fed(c, cache, [other], c.noise((1, 8, c.site.d_in), 3), (8,))
    cache.close(other)
    rest = fed(c, cache, [cache.swap_in(moved)], x[:, 7:], (6,), 7)
    assert torch.equal(torch.cat([begun, rest], 1), whole), "moved to the host and back"


def law_quantised(c: Case) -> None:
    """With older tokens in eight bits, results are near those without; fields that cannot be are refused by name."""
    if c.slot not in TOKENS or not any(c.fields.values()):
        return
    c.modules.eval()
    size, formats = page_size(1, 4), Formats({"*": BITS}, residual=1)
    try:
        formats.resolve(c.fields, size)
    except ValueError as error:
        raise Refusal(str(error).partition(": ")[2]) from None
    x, chunks = c.noise((1, LENGTH, c.site.d_in), 1), (4, 4, 1, 1, 1, 1, 1)
    cache = Quantised(c.fields, size, torch.float64, c.device, formats)
    got, whole = fed(c, cache, [cache.open()], x, chunks), fed(c, *open_cache(c, 1, 4), x, chunks)
    off = float(((got - whole).abs().mean() / whole.std()).detach())
    assert off < ROUGH, f"off by {off:.2f} of the results' spread"
    assert off > 0, "nothing was quantised"


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

"""The law of the same bits: in half precision, and whatever a server computes beside a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from assay.cache.cache import Cache
from assay.cache.paged import Paged
from assay.cache.size import Size
from assay.cache.store import Slot, Store
from assay.conform.cases import MEMORY, Case, Refusal
from assay.conform.stored import LENGTH, named, page_size
from assay.ops import native
from assay.ops.step import Step
from assay.parts.base import Part

ALONE, COMPANY = (LENGTH,), (2, 8, 1, 2)  # chunks of the sequence by itself, and beside others
FEW = 4  # tokens, where each is a call
ROWS = 3  # times the longest chunk beside others, no more tokens than a part says that it keeps apart: 32
WHOLE = ("selectors",)  # slots whose results are as wide as a store: a part that has one is where it is tried


def law_deterministic(c: Case) -> None:
    """In bfloat16 under deterministic algorithms, a sequence's results have the same bits beside others, cut and stored
    in another way: of up to 32 tokens a call, where the part's compiled kernels keep them apart, or of one."""
    why = c.spec.refusals().get("chunking")
    if why is not None:
        raise Refusal(f"it is not served token by token: {why}")
    if c.slot in WHOLE:
        return
    c.modules.to(torch.bfloat16).eval()
    x = c.noise((ROWS, LENGTH, c.site.d_in), 1).to(torch.bfloat16)
    with deterministic():
        alone, company = (together if apart(c) else one_by_one)(c, x)
    assert torch.isfinite(alone).all(), "not finite"
    assert torch.equal(alone, company), f"{int((alone != company).any(-1).sum())} tokens have other bits beside others"


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def apart(c: Case) -> bool:
    """Whether tokens of one call keep their bits: every sum is made by a compiled kernel."""
    mingled = (m.mingles() for m in c.modules.modules() if isinstance(m, Part))
    return native.kernels() is not None and all(why is None for why in mingled)


def together(c: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    rows, pages = stores(c, 1), stores(c, ROWS)
    alone = [fed(c, rows[0], rows[1], piece, past) for piece, past in cut(x[:1], ALONE)]
    company = [fed(c, pages[0], pages[1], piece, past)[:1] for piece, past in cut(x, COMPANY)]
    return torch.cat(alone, 1), torch.cat(company, 1)


def one_by_one(c: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes are then always the same; what differs is the store, and who was there before."""
    rows, pages = stores(c, 1), stores(c, ROWS)
    alone = [fed(c, rows[0], rows[1], piece, past) for piece, past in cut(x[:1, :FEW], (1,) * FEW)]
    company = []
    for piece, past in cut(x[:, :FEW], (1,) * FEW):
        told = [fed(c, pages[0], pages[1][row : row + 1], piece[row : row + 1], past) for row in (1, 0)]
        company.append(told[-1])
    return torch.cat(alone, 1), torch.cat(company, 1)


def stores(c: Case, count: int) -> tuple[Store | None, list[Slot]]:
    """Rows for one sequence, pages for several; nothing where nothing is stored."""
    if not any(c.fields.values()):
        return None, []
    if count == 1:
        store: Cache | Paged = Cache(c.fields, Size(1, LENGTH, LENGTH, MEMORY, 1), torch.bfloat16, c.device)
    else:
        store = Paged(c.fields, page_size(count, max(COMPANY)), torch.bfloat16, c.device)
    return store, [store.open() for _ in range(count)]


def cut(x: Tensor, chunks: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
    """Pieces [R, t, D] of these lengths, and how many tokens came before."""
    past = 0
    for piece in x.split(chunks, 1):
        yield piece, past
        past += piece.shape[1]


def fed(c: Case, store: Store | None, slots: list[Slot], x: Tensor, past: int) -> Tensor:
    """Rows of new tokens [R, T, D] after `past` -> [R, T, D'], as a server feeds them."""
    rows, length, _ = x.shape
    step: Step = c.step(rows, length, past).with_(prefix=None)
    if store is not None:
        step = step.with_(inputs={"ids": named(x.double()).view(-1)})
    if step.memory is not None:
        step = step.with_(memory=replace(step.memory, h=step.memory.h.to(x.dtype)))
    states = None if store is None else store.begin(slots, step)
    y = c.run(x.reshape(rows * length, -1), step, states)
    if store is not None:
        store.settle(slots)
    return y.view(rows, length, -1)

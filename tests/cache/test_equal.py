"""However a text reaches the model, through whichever store, its logits are those of one pass without a cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.cache import Cache, Size
from assay.engine.runner import right_padded
from assay.model.lm import LM, build, state_table
from assay.ops.step import Step, rows_step
from assay.spec.load import dump, validate
from assay.spec.model import ModelSpec
from tests.cache.models import POSITIONS, SEES, WINDOW, feed, logits, model, opened, run, spec, tokens

CPU = torch.device("cpu")
KINDS = [*SEES, "linear"]


def close(a: Tensor, b: Tensor, within: float = 1e-10) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) < within


def margin(lm: LM) -> float:
    """Linear attention declares its state in float32."""
    low = any(f.dtype == "float32" for fields in state_table(lm.spec).values() for f in fields)
    return 1e-4 if low else 1e-10


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", SEES)
def test_decode_and_chunks_equal_one_pass(kind: str, position: str) -> None:
    lm, ids = model((kind, kind), position), tokens(2, 17)
    whole = logits(lm, ids)
    for cuts in ([17], [1] * 17, [7, 1, 1, 8]):
        store, slots = opened(lm, Size(2, 17, max(cuts)))
        close(torch.cat([feed(lm, store, slots, piece) for piece in ids.split(cuts, 1)], 1), whole)


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 9),
)
@settings(max_examples=12)
def test_any_chunking_of_any_hybrid(kinds: list[str], cuts: list[int], seed: int) -> None:
    lm, ids = model(tuple(kinds)), tokens(2, sum(cuts), seed)
    store, slots = opened(lm, Size(2, sum(cuts), max(cuts)))
    pieces = torch.cat([feed(lm, store, slots, piece) for piece in ids.split(cuts, 1)], 1)
    close(pieces, logits(lm, ids), margin(lm))


@given(
    kind=st.sampled_from(KINDS),
    position=st.sampled_from(list(POSITIONS)),
    rounds=st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=2, max_size=4),
)
@settings(max_examples=12)
def test_padded_rows_equal_rows_alone(kind: str, position: str, rounds: list[tuple[int, int, int]]) -> None:
    """Rows that bring different numbers of tokens in each step, some of them none at all."""
    lm, size = model((kind, kind), position), Size(3, 40, 6)
    store, slots = opened(lm, size)
    texts = [tokens(1, 40, seed)[0] for seed in range(3)]
    whole = [logits(lm, text[None])[0] for text in texts]
    for counts in rounds:
        if not any(counts):
            continue
        past = [store.length(slot) for slot in slots]
        rows = [text[p : p + n].tolist() for text, p, n in zip(texts, past, counts, strict=True)]
        step = right_padded(rows, past, [64] * 3, CPU)
        expected = torch.stack([whole[i][p + n - 1] for i, (p, n) in enumerate(zip(past, counts, strict=True)) if n])
        close(run(lm, store, slots, step), expected, margin(lm))


def flat_step(ids: list[Tensor], past: list[int], grid: tuple[int, int] | None) -> Step:
    """Sequences one after another on the flat axis."""
    counts = torch.tensor([len(t) for t in ids])
    seq = torch.arange(len(ids)).repeat_interleave(counts)
    index = torch.cat([torch.arange(p, p + len(t)) for t, p in zip(ids, past, strict=True)])
    ends = counts.cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends])
    horizon = torch.full((len(ids),), 64)
    text = {"ids": torch.cat(ids)}
    return Step(
        text, seq, index, index, starts, torch.tensor(past), horizon, grid, 0, int(counts.max()), saves=ends - 1
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [None, (1, 16)])
def test_packed_prefill_beside_decodes(kind: str, grid: tuple[int, int] | None) -> None:
    """A prefill chunk and single tokens of other sequences in one step, slots in any order."""
    lm, ids = model((kind, "full")), [tokens(1, 30, seed)[0] for seed in range(3)]
    whole = [logits(lm, text[None])[0] for text in ids]
    store, slots = opened(lm, Size(3, 30, 14))
    done = [0, 0, 0]
    for order, counts in (([0, 1, 2], [5, 7, 4]), ([2, 0, 1], [1, 14, 1]), ([1, 2, 0], [14, 1, 1]), ([2, 1], [8, 8])):
        texts = [ids[o][done[o] : done[o] + n] for o, n in zip(order, counts, strict=True)]
        step = flat_step(texts, [done[o] for o in order], grid)
        out = run(lm, store, [slots[o] for o in order], step).split(counts)
        for o, n, got in zip(order, counts, out, strict=True):
            close(got, whole[o][done[o] : done[o] + n], margin(lm))
            done[o] += n


@pytest.mark.parametrize("kind", SEES)
def test_packed_documents_equal_cached_ones(kind: str) -> None:
    """Two documents in one row of a training step see only themselves: each equals its own cached decode."""
    lm, (a, b) = model((kind, kind)), (tokens(1, 9, 1)[0], tokens(1, 12, 2)[0])
    with torch.no_grad():
        packed = lm(flat_step([a, b], [0, 0], (1, 21))).logits
    assert packed is not None
    for text, got in zip((a, b), packed.split([9, 12]), strict=True):
        store, slots = opened(lm, Size(1, 12, 3))
        close(torch.cat([feed(lm, store, slots, t[None])[0] for t in text.split(1)]), got)


@given(prompt=st.integers(1, 3 * WINDOW), chunk=st.integers(1, 2 * WINDOW), more=st.integers(0, WINDOW + 2))
@settings(max_examples=12)
def test_ring_equals_full_store_under_the_band(prompt: int, chunk: int, more: int) -> None:
    """The ring forgets; a store that keeps everything and a mask gives the same, also for prefills longer than W."""
    lm, ids = model(("window", "window")), tokens(1, prompt + more, prompt)
    fields = state_table(lm.spec)
    assert all(f.keep == WINDOW for declared in fields.values() for f in declared)
    whole = {n: tuple(type(f)(f.name, f.per, f.shape, f.dtype) for f in declared) for n, declared in fields.items()}
    size = Size(1, prompt + more, chunk)
    stores = Cache(fields, size, torch.float64), Cache(whole, size, torch.float64)
    slots = [[store.open()] for store in stores]
    cuts = [*[min(chunk, prompt - at) for at in range(0, prompt, chunk)], *[1] * more]
    for piece in ids.split(cuts, 1):
        ring, full = (feed(lm, store, slot, piece) for store, slot in zip(stores, slots, strict=True))
        close(ring, full, 1e-12)
    kept = min(prompt + more, WINDOW + chunk - 1)
    assert {e.capacity for e in stores[0].entries.values()} == {kept}
    assert stores[0].reserved_bytes() * (prompt + more) == stores[1].reserved_bytes() * kept


def test_window_reaches_exactly_layers_times_w_minus_one_back() -> None:
    """d out_i / d x_j is 0 for i - j > L (W - 1), and not at equality: what stacked windows can carry."""
    layers, length = 3, 3 * (WINDOW - 1) + 4
    lm, ids = model(("window",) * layers), tokens(1, length)
    table = lm.embed.table()
    x = table[ids[0]].detach().requires_grad_()
    lm.embed.forward, original = (lambda step: x), lm.embed.forward  # type: ignore[method-assign]
    try:
        out = lm(rows_step(ids)).logits[-1]  # type: ignore[index]
    finally:
        lm.embed.forward = original  # type: ignore[method-assign]
    grads = torch.stack([torch.autograd.grad(y, x, retain_graph=True)[0].abs().sum(-1) for y in out])
    reach = layers * (WINDOW - 1)
    distance = length - 1 - torch.arange(length)
    assert float(grads[:, distance > reach].abs().max()) == 0.0
    assert float(grads[:, distance == reach].abs().max()) > 0.0


def test_decode_after_fork_close_and_reuse() -> None:
    """A row that was used before, and a row beside one that holds NaN, serve as new."""
    lm = model(("full", "window"))
    store, (first, second) = opened(lm, Size(2, 20, 6))
    feed(lm, store, [first], tokens(1, 6))
    for pools in store.pools.values():
        for pool in pools.values():
            pool[first.row].fill_(float("nan"))
    store.close(first)
    assert all(bool(pool[first.row].isfinite().all()) for pools in store.pools.values() for pool in pools.values())
    again = store.open()
    assert again.row == first.row and again != first
    ids = tokens(2, 6, 5)
    close(feed(lm, store, [again, second], ids), logits(lm, ids))
    with pytest.raises(ValueError, match="closed"):
        store.length(first)


def test_layers_that_take_keys_from_another() -> None:
    """Shared keys and values are stored once, under the layer that gives them."""
    base = dump(spec(("full", "window")))
    base["blocks"]["full"]["mixer"]["gives"] = base["blocks"]["window"]["mixer"]["takes"] = "kv"
    base["blocks"]["window"]["mixer"]["sees"] = base["blocks"]["full"]["mixer"]["sees"]
    lm, ids = build(validate(ModelSpec, base, "test"), 3).double().eval(), tokens(2, 9)
    store, slots = opened(lm, Size(2, 9, 4))
    assert store.reserved_bytes() == 2 * 9 * 2 * (2 * 4) * 8
    close(torch.cat([feed(lm, store, slots, piece) for piece in ids.split([4, 1, 1, 3], 1)], 1), logits(lm, ids))


def test_every_position_of_the_spec_is_used() -> None:
    """The tests above mean something: the schemes give different logits, and so do the windows."""
    outs = [logits(model(("full",), name), tokens(1, 12)) for name in POSITIONS if name != "raw"]
    outs += [logits(model((kind,)), tokens(1, 12)) for kind in SEES if kind != "full"]
    assert all(float((a - b).abs().max()) > 1e-3 for i, a in enumerate(outs) for b in outs[:i])
    assert spec(("full",)).plan == ("full",)

"""What was computed once is not computed again, and gives the same: full attention, windows, recurrences, hybrids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.cache import Cache, Paged, PageSize, Size, Slot, predict, within
from assay.cost.bill import Question, bill, reserved
from assay.model.lm import LM, build, state_table
from assay.ops.step import Memory, rows_step
from assay.spec.base import StateField
from assay.spec.load import load_model
from tests.cache.models import WINDOW, feed, logits, model, opened, spec, tokens

PAGE = 4


def store_of(lm: LM, pages: int = 60, **size: int) -> Paged:
    made = {"rows": 4, "page": PAGE, "pages": pages, "chunk": 8, "tails": 20, "snapshots": 8, **size}
    return Paged(state_table(lm.spec), PageSize(**made), torch.float64)


def read(lm: LM, store: Paged, slot: Slot, ids: Tensor) -> Tensor:
    """[T, V]: feed what is not stored yet, in chunks that end at borders."""
    out, at = [], store.length(slot)
    while at < len(ids):
        step = 8 if store.border is None else store.border - at % store.border
        out.append(feed(lm, store, [slot], ids[None, at : at + min(step, 8)])[0])
        store.settle([slot])
        at += min(step, 8)
    return torch.cat(out)


@pytest.mark.parametrize("name", ["lab-64-jamba", "lab-64-recurrentgemma", "lab-64-kimi-linear", "lab-64-nemotron-h"])
def test_a_hybrid_starts_from_what_is_known(name: str) -> None:
    """State that is declared in float32 is stored so, whence the margin."""
    lm = build(load_model(name), seed=0).double().eval()
    ids = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(1))[0]
    store, cold = store_of(lm), store_of(lm)
    first = store.open(ids.tolist())
    read(lm, store, first, ids)
    store.close(first)
    told = torch.cat([ids[:21], ids[:9]])
    again = store.open(told.tolist())
    assert store.length(again) == 20 and store.counts.hit_tokens == 20 and store.counts.hits == 1
    whole = read(lm, cold, cold.open(), told)
    assert float((read(lm, store, again, told) - whole[20:]).abs().max()) < 1e-5
    assert float((whole[20:] - read(lm, cold, cold.open(), ids)[20:]).abs().max()) > 1e-3, "the endings differ"


@given(
    kinds=st.lists(st.sampled_from(["full", "window", "chunk", "linear"]), min_size=1, max_size=3, unique=True),
    texts=st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=20), st.booleans()), min_size=2, max_size=6),
)
@settings(max_examples=10)
def test_the_longest_known_beginning(kinds: list[str], texts: list[tuple[list[int], bool]]) -> None:
    """With room for everything it is the longest common beginning with any text of the same key, in whole pages."""
    lm = model(tuple(kinds))
    store = store_of(lm, 200, tails=200, snapshots=99)
    done: list[tuple[list[int], bool]] = []
    for text, tenant in texts:
        slot = store.open(text, b"tenant" if tenant else b"")
        best = max((common(text[:-1], other) for other, key in done if key == tenant), default=0)
        assert store.length(slot) == best // PAGE * PAGE
        if text:
            read(lm, store, slot, torch.tensor(text))
        done.append((text, tenant))
        store.close(slot)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_nothing_that_was_not_settled_is_known() -> None:
    lm, ids = model(("full", "linear")), tokens(1, 12)
    store = store_of(lm)
    slot = store.open(ids[0].tolist())
    feed(lm, store, [slot], ids[:, :8])
    store.close(slot)
    assert store.length(store.open(ids[0].tolist())) == 0
    assert store.report()["snapshots"] == 0


@pytest.mark.parametrize("forked", [False, True])
def test_a_known_page_is_not_written(forked: bool) -> None:
    """Rewound into a page that has a name: the name goes, or, where another sequence has the page, it is copied."""
    lm, ids = model(("full",)), tokens(1, 12)
    store = store_of(lm)
    slot = store.open()
    read(lm, store, slot, ids[0, :8])
    twin = store.fork(slot) if forked else None
    store.rewind(slot, 6)
    feed(lm, store, [slot], 18 - ids[:, 6:7])
    changed = [*ids[0, :6].tolist(), *(18 - ids[0, 6:7]).tolist(), 1]
    feed(lm, store, [slot], torch.tensor([[1]]))
    store.settle([slot])
    assert store.length(store.open([*changed, 0])) == 8, "the page has the name of what it holds now"
    again = store.open(ids[0].tolist())
    start, whole = store.length(again), logits(lm, ids)[0]
    assert start == (8 if forked else 4)
    assert float((read(lm, store, again, ids[0]) - whole[start:]).abs().max()) < 1e-10
    if twin is not None:
        assert float((feed(lm, store, [twin], ids[:, 8:])[0] - whole[8:]).abs().max()) < 1e-10


def test_what_is_not_finite_stays_with_its_text() -> None:
    """Cached pages full of NaN are evicted, and serve as new."""
    lm, ids = model(("full",)), tokens(1, 6)
    store = store_of(lm, 3)
    slot = store.open()
    read(lm, store, slot, tokens(1, 12, 3)[0])
    store.close(slot)
    for _, pool in store.tensors():
        pool.fill_(float("nan"))
    slot = store.open()
    assert float((read(lm, store, slot, ids[0]) - logits(lm, ids)[0]).abs().max()) < 1e-10
    group = store.groups["token", 0]
    assert all(bool(pool[group.tables[slot.row].pages].isfinite().all()) for _, pool in store.tensors())
    assert store.report()["evictions"] == 2


def test_what_depends_on_more_than_tokens_gets_no_name() -> None:
    """Positions of one's own, a second input, a memory."""
    lm, ids = model(("full",)), tokens(1, 8)
    for change in ("positions", "inputs"):
        store, step = store_of(lm), rows_step(ids)
        step = step.with_(positions=step.index + 1) if change == "positions" else step
        step = step.with_(inputs={**step.inputs, "types": step.ids}) if change == "inputs" else step
        slot = store.open(ids[0].tolist())
        lm(step, store.begin([slot], step))
        store.settle([slot])
        assert store.length(store.open(ids[0].tolist())) == 0
    fields = {"cross": (StateField("k", "memory", (2,)),), "self": (StateField("k", "token", (1,)),)}
    store = Paged(fields, PageSize(3, 2, 9, 8, memory=3), torch.float64)
    slot, memory = store.open([0] * 8), Memory(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), torch.arange(3))
    step = rows_step(torch.zeros(1, 8, dtype=torch.long)).with_(memory=memory)
    states = store.begin([slot], step)
    states["cross"].append(step, k=memory.h.double())
    states["self"].append(step, k=torch.ones(8, 1).double())
    store.settle([slot])
    assert store.length(store.open([0] * 8)) == 0
    twin = store.fork(slot)
    back = store.swap_in(store.swap_out(twin))
    later = rows_step(torch.zeros(1, 1, dtype=torch.long), 8)
    view = store.begin([back], later)["cross"].view(later)
    assert torch.equal(view.dense("k")[0][view.layout.seq[0] == 0], memory.h.double())
    store.check_integrity()


def test_a_window_holds_a_bounded_number_of_pages() -> None:
    """Whatever the length: those that `window + chunk - 1` entries touch."""
    lm, ids = model(("window", "full")), tokens(1, 50)
    for page, most in ((1, WINDOW + 7), (4, 4), (16, 2)):
        store = store_of(lm, -(-50 // page), rows=1, page=page, tails=0)
        (window,) = (group for group in store.groups.values() if group.keep)
        slot = store.open()
        out = [feed(lm, store, [slot], piece)[0] for piece in ids.split([8] * 5 + [1] * 10, 1)]
        assert window.blocks.total == most
        assert window.report()["used"] <= most
        assert float((torch.cat(out) - logits(lm, ids)[0]).abs().max()) < 1e-10
        assert store.fits([]) and not store.fits([(slot, 50)])


def test_a_long_prompt_fits_where_its_window_does() -> None:
    """`fits` counts what a window needs in flight, and not every page that passes through it."""
    lm = model(("window",))
    store = store_of(lm, 4, rows=1, tails=0)
    slot = store.open()
    assert store.fits([(slot, 1000)])
    for piece in tokens(1, 60).split(8, 1):
        assert store.fits([(slot, piece.shape[1])])
        feed(lm, store, [slot], piece)


def test_rows_swap_too() -> None:
    lm = model(("full", "window", "linear"))
    store, (first, other) = opened(lm, Size(2, 20, 8, saves=2))
    ids = tokens(2, 12)
    feed(lm, store, [first, other], ids[:, :8])
    fresh, slots = opened(lm, Size(2, 20, 8, saves=2))
    feed(lm, fresh, slots, ids[:, :8])
    swapped = store.swap_out(first)
    assert swapped.bytes == store.reserved_bytes() // 2
    feed(lm, store, [store.open()], tokens(1, 3, 5))
    assert not store.holds(swapped)
    store.close(other)
    back = store.swap_in(swapped)
    alone = feed(lm, fresh, slots[:1], ids[:1, 8:])
    assert torch.equal(feed(lm, store, [back], ids[:1, 8:]), alone)


@given(
    kinds=st.lists(st.sampled_from(["full", "window", "chunk", "linear"]), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    context=st.integers(1, 40),
    page=st.integers(1, 9),
)
def test_allocated_is_predicted_is_billed(kinds: list[str], batch: int, context: int, page: int) -> None:
    """`assay bill --page` reserves what pages for one token at a time take."""
    said, ask = spec(kinds), Question(context, batch=batch, page=page)
    size = PageSize(batch, page, batch * -(-context // page))
    store = Paged(state_table(said), size, torch.bfloat16)
    assert store.reserved_bytes() == predict(state_table(said), size, "bfloat16").reserved
    assert store.reserved_bytes() == bill(said, ask).reserved_bytes


@given(memory=st.integers(1, 9), page=st.integers(1, 4), window=st.integers(1, 9), context=st.integers(1, 20))
def test_a_memory_and_a_window_are_billed(memory: int, page: int, window: int, context: int) -> None:
    fields = (StateField("m", "memory", (3,)), StateField("s", "sequence", (2,), "float32"))
    table = {"a": fields, "b": (StateField("k", "token", (2, 3), keep=window),), "c": (StateField("k", "token", (1,)),)}
    size = PageSize(2, page, 2 * -(-context // page), memory=memory)
    store = Paged(table, size, torch.bfloat16)
    ask = Question(context, batch=2, page=page, memory=memory)
    assert store.reserved_bytes() == reserved([f for own in table.values() for f in own], ask)
    assert store.reserved_bytes() == predict(table, size, "bfloat16").reserved


@given(
    kinds=st.lists(st.sampled_from(["full", "window", "linear"]), min_size=1, max_size=3),
    budget=st.integers(3000, 200_000),
    snapshots=st.integers(0, 40_000),
    chunk=st.integers(1, 9),
)
def test_a_budget_is_kept_and_used(kinds: list[str], budget: int, snapshots: int, chunk: int) -> None:
    fields, size = state_table(spec(kinds)), PageSize(2, 4, 1, chunk, saves=2, tails=3)
    try:
        found = within(fields, size, "float32", budget, snapshots)
    except ValueError as error:
        assert "one page and what stands beside it" in str(error)
        return
    store = Paged(fields, found, torch.float32)
    told = predict(fields, found, "float32")
    assert store.reserved_bytes() == told.reserved <= budget and told.headroom >= 0
    more = predict(
        fields, PageSize(2, 4, found.pages + 1, chunk, saves=2, tails=3, snapshots=found.snapshots), "float32"
    )
    assert more.reserved > budget or more.reserved == told.reserved, "one page more would not fit, or take nothing"
    one = kinds.count("linear") * 4 * (2 * 8 * 8 + 2 * 8)
    assert found.snapshots == (snapshots // one if one else 0)


def test_what_pages_refuse() -> None:
    lm, ids = model(("window", "full")), tokens(1, 13)
    store = store_of(lm, 3, rows=1)
    slot = store.open()
    with pytest.raises(ValueError, match="9 new tokens; windows were allocated for 8 at once"):
        feed(lm, store, [slot], ids[:, :9])
    feed(lm, store, [slot], ids[:, :8])
    with pytest.raises(ValueError, match="2 pages more are needed for fields that stay visible; 1 of 3 are free"):
        feed(lm, store, [slot], ids[:, 8:].repeat(1, 1)[:, :5])
    assert store.length(slot) == 8
    with pytest.raises(ValueError, match="no free row: all 1"):
        store.open()
    with pytest.raises(ValueError, match="paged cache size: page is 0; accepted: 1 or more"):
        PageSize(1, 0, 1)
    with pytest.raises(ValueError, match="every=4"):
        Paged({"a": (StateField("k", "token", (2,), every=4),)}, PageSize(1, 4, 2), torch.float32)


def test_a_fork_writes_a_copy_and_both_go_on() -> None:
    lm, ids = model(("full", "window", "linear")), tokens(1, 10)
    store, (fresh, slots) = store_of(lm), opened(lm, Size(2, 30, 8))
    slot = store.open()
    for cache, own in ((store, [slot]), (fresh, slots)):
        for row in own:
            feed(lm, cache, [row], ids[:, :8])
            feed(lm, cache, [row], ids[:, 8:])
    twin = store.fork(slot)
    used = store.groups["token", 0].report()["used"]
    both = feed(lm, store, [slot, twin], tokens(2, 3, 7))
    assert float((both - feed(lm, fresh, slots, tokens(2, 3, 7))).abs().max()) < 1e-12
    assert used == 3 and store.groups["token", 0].report()["used"] == 2 + 2 * 2, "two pages are shared, two are not"


def test_a_copy_on_write_needs_a_page() -> None:
    lm, ids = model(("full",)), tokens(1, 6)
    store = store_of(lm, 2)
    slot = store.open()
    feed(lm, store, [slot], ids)
    twin = store.fork(slot)
    assert not store.fits([(slot, 1)]) and not store.fits([(slot, 1), (twin, 1)])
    with pytest.raises(ValueError, match="1 pages more are needed"):
        feed(lm, store, [slot], ids[:, :1])
    store.close(twin)
    assert store.fits([(slot, 2)]) and not store.fits([(slot, 3)])
    feed(lm, store, [slot], ids[:, :2])


def test_one_group_serves_every_layer_of_one_window() -> None:
    store = store_of(model(("full", "window", "full", "window")))
    assert sorted(store.groups) == [("token", 0), ("token", WINDOW)]
    rows = Cache(state_table(spec(("full", "window"))), Size(1, 8), torch.float64)
    assert rows.border is None and store.border is None
    assert store_of(model(("linear",)), border=2).border == 2 * PAGE

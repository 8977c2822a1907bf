"""Pages with formats: what is read is what the functions on pages say, bytes, sharing, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.cache import Paged, PageSize, Slot
from assay.cache.coded import Quantised
from assay.cache.formats import Format, Formats, predict_quantised
from assay.cache.quantised import dequantise, quantise
from assay.cost.bill import Question, bill
from assay.model.lm import state_table
from assay.ops.step import rows_step
from assay.spec.base import StateField
from tests.cache.models import feed, logits, model, run, spec, tokens

PAGE, RESIDUAL = 4, 6
FIELDS = {"a": (StateField("k", "token", (2, 5)), StateField("v", "token", (2, 5)), StateField("x", "token", (3,)))}
RULES = {"*.k": "int4/channel:2", "a.v": "int8/token"}


def made(rows: int = 3, pages: int = 12, fields: Any = FIELDS, **rules: str) -> Quantised:
    formats = Formats(rules or RULES, RESIDUAL)
    return Quantised(fields, PageSize(rows, PAGE, pages, chunk=5), torch.float64, formats=formats)


def value(text: list[int]) -> dict[str, Tensor]:
    """What each token stores: any function of the token."""
    x = torch.tensor(text, dtype=torch.float64)[:, None, None]
    k = torch.sin(x * torch.arange(1, 11, dtype=torch.float64).view(2, 5))
    return {"k": k, "v": torch.cos(3 * k), "x": k[:, 0, :3].clone()}


def expected(text: list[int], coded: int) -> dict[str, Tensor]:
    """What is read of it when the first `coded` tokens are quantised: page by page, each in one go."""
    out = value(text)
    for name, text_form in (("k", "int4/channel:2"), ("v", "int8/token")):
        form = Format.parse(text_form)
        for at in range(0, coded, PAGE):
            page = out[name][at : at + PAGE]
            out[name][at : at + PAGE] = dequantise(quantise(page, form), form, 5, torch.float64)
    return out


def append(store: Quantised, slot: Slot, text: list[int], new: list[int]) -> dict[str, Tensor]:
    """Store the tokens, settle, and return what is seen of the whole text."""
    past = store.length(slot)
    assert past == len(text)
    step = rows_step(torch.tensor([new]), past)
    view = store.begin([slot], step)["a"].append(step, **value(new))
    store.settle([slot])
    store.check_integrity()
    text += new
    return {name: view.dense(name)[0, : len(text)] for name in view.fields}


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_any_steps_are_pages_quantised_in_one_go(counts: list[int], seed: int) -> None:
    """Groups are crossed anywhere: a page is quantised once, when all of it is older than the residual; what is newer
    is exact, and so is the field without a format."""
    store, text, numbers = made(), list[int](), iter(range(seed, 10**6))
    slot = store.open()
    for count in counts:
        past = len(text)
        if past + count > 12 * PAGE:
            break
        seen = append(store, slot, text, [next(numbers) for _ in range(count)])
        coded = max(0, past - RESIDUAL) // PAGE * PAGE
        for name, wanted in expected(text, coded).items():
            assert torch.allclose(seen[name], wanted, rtol=1e-12, atol=1e-12), name
            assert torch.equal(seen[name][coded:], value(text)[name][coded:]), name
        assert store.report()["quantised_pages"] == coded // PAGE


def test_three_sequences_in_one_step_and_pages_used_again() -> None:
    """Scattered pages, of which some are quantised, one whole and some free; closed ones leave nothing behind."""
    store, texts = made(pages=18), [[1], [40, 41, 42], [80, 81]]
    slots = [store.open() for _ in texts]
    for slot, text in zip(slots, texts, strict=True):
        append(store, slot, held := [], text)
        assert held == text
    for number in range(13):
        for slot, text in zip(slots, texts, strict=True):
            past = len(text)
            seen = append(store, slot, text, [text[0] * 7 + number])
            for name, wanted in expected(text, max(0, past - RESIDUAL) // PAGE * PAGE).items():
                assert torch.allclose(seen[name], wanted, rtol=1e-12, atol=1e-12)
        if number == 6:
            store.close(slots[1])
            slots[1], texts[1] = store.open(), []
            append(store, slots[1], texts[1], [99])
    for slot in slots:
        store.close(slot)
    store.check_integrity()
    assert store.report()["held_bytes"] == 0


def test_without_a_format_it_is_the_paged_cache() -> None:
    lm, size = model(("full", "window")), PageSize(2, 4, 20, 6)
    plain = Paged(state_table(lm.spec), size, torch.float64)
    coded = Quantised(state_table(lm.spec), size, torch.float64)
    for piece in tokens(1, 17).split([6, 1, 1, 5, 4], 1):
        outs = [feed(lm, store, [store_slot(store)], piece) for store in (plain, coded)]
        assert torch.equal(*outs)


def store_slot(store: Paged) -> Slot:
    """Its only open slot, opened if need be."""
    return Slot(0, store.births[0]) if 0 in store.lengths else store.open()


def test_a_residual_longer_than_the_text_changes_nothing() -> None:
    lm = model(("full", "full"))
    formats = Formats({"*.k": "int2/token", "*.v": "int2/token"}, 64)
    store = Quantised(state_table(lm.spec), PageSize(1, 4, 20, 9), torch.float64, formats=formats)
    slot, ids = store.open(), tokens(1, 20)
    got = torch.cat([feed(lm, store, [slot], piece) for piece in ids.split([9, 1, 1, 9], 1)], 1)
    assert float((got - logits(lm, ids)).abs().max()) < 1e-12


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.5)])
def test_logits_of_a_model_move_by_little(bits: int, most: float) -> None:
    lm, ids = model(("full", "full")), tokens(2, 30)
    rules = {"*.k": f"int{bits}/channel", "*.v": f"int{bits}/token"}
    store = Quantised(state_table(lm.spec), PageSize(2, 4, 20, 6), torch.float64, formats=Formats(rules, 4))
    slots = [store.open(), store.open()]
    got = torch.cat([feed(lm, store, slots, piece) for piece in ids.split([6, *[1] * 24], 1)], 1)
    error = float((got - logits(lm, ids)).abs().max())
    assert 0 < error < most and store.report()["quantised_pages"] >= 10


def test_bfloat16_is_rounding() -> None:
    store, text = made(**{"*.k": "bf16"}), list[int]()
    seen = append(store, store.open(), text, [3, 4, 5])
    assert torch.equal(seen["k"], value(text)["k"].bfloat16().double()) and seen["k"].dtype == torch.float64
    assert torch.equal(seen["v"], value(text)["v"])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    pages=st.integers(1, 9),
    chunk=st.integers(1, 9),
    residual=st.integers(0, 9),
    rules=st.sampled_from([{}, RULES, {"*": "int8/channel"}, {"*.x": "bf16", "*.k": "int2/token:5"}]),
)
def test_allocated_is_predicted(rows: int, pages: int, chunk: int, residual: int, rules: dict[str, str]) -> None:
    size, formats = PageSize(rows, PAGE, pages, chunk), Formats(rules, residual)
    store = Quantised(FIELDS, size, torch.float32, formats=formats)
    told = predict_quantised(FIELDS, size, "float32", formats)
    held = [t for pools in store.pools.values() for t in pools.values()]
    held += [t for packed in store.packed.values() for t in (packed.codes, packed.scale, packed.zero)]
    assert told.reserved == store.reserved_bytes() == sum(t.numel() * t.element_size() for t in held)


def test_bytes_by_hand() -> None:
    """k: 4 tokens x 2 heads x 3 bytes of codes and 2 groups x 10 of 4 bytes; v: 4 x 2 x 5 and 8 x 4; x whole."""
    size, formats = PageSize(2, PAGE, 10, chunk=5), Formats(RULES, RESIDUAL)
    told, whole = predict_quantised(FIELDS, size, "float32", formats), 2 * (-(-(6 + 3 + 5) // 4))
    assert told.stored == 10 * (24 + 80) + 10 * (40 + 32) + 10 * 4 * 12
    assert told.headroom == 2 * whole * 4 * 10 * 4
    rounded = predict_quantised(FIELDS, size, "float32", Formats({"*": "bf16"}))
    assert rounded.reserved == 10 * 4 * (10 + 10 + 3) * 2


def test_a_known_beginning_is_read_quantised() -> None:
    """Another sequence finds what is quantised and settled, and after a close all whole pages; nobody finds a page
    that stands whole."""
    store, text = made(pages=30), list[int]()
    first = store.open()
    for number in range(21):
        append(store, first, text, [number])
    store.begin([first], rows_step(torch.tensor([[21]]), 21))  # quantises up to 21 - 6 tokens
    assert store.length(store.open(text)) == 12
    store.close(first)
    other = store.open([*text, 50, 51])
    store.check_integrity()
    assert store.length(other) == 20
    again = text[:20]
    seen = append(store, other, again, [50, 51])
    for name, wanted in expected(again, 20).items():
        assert torch.allclose(seen[name], wanted, rtol=1e-12, atol=1e-12)


def test_forks_share_and_part() -> None:
    store, text = made(pages=30), list[int]()
    slot = store.open()
    for number in range(14):
        append(store, slot, text, [number])
    twin, other = store.fork(slot), list(text)
    for number in range(9):
        for own, words, new in ((slot, text, number), (twin, other, 70 + number)):
            past = len(words)
            seen = append(store, own, words, [new])
            coded = max(0, past - RESIDUAL) // PAGE * PAGE
            assert torch.allclose(seen["k"], expected(words, coded)["k"], rtol=1e-12, atol=1e-12)
    store.close(slot)
    append(store, twin, other, [1])


def test_going_back_stops_at_a_quantised_page() -> None:
    store, text = made(), list[int]()
    slot = store.open()
    for number in range(20):
        append(store, slot, text, [number])
    store.settle([slot])
    coded = 3 * PAGE  # after 19 tokens: 13 of them are older than the residual
    assert [store.reach(slot, n) for n in range(9, 16)] == [8, 8, 8, 12, 13, 14, 15]
    with pytest.raises(ValueError, match="rewind to 10: no longer stored; the nearest before it is 8"):
        store.rewind(slot, 10)
    for length in (15, coded, 8):
        store.rewind(slot, length)
        store.check_integrity()
        del text[length:]
        seen = append(store, slot, text, [100 + length])
        assert torch.allclose(seen["k"], expected(text, min(length, coded))["k"], rtol=1e-12, atol=1e-12)
        store.rewind(slot, length)
        del text[length:]


def test_swapped_out_and_in_is_the_same_bits() -> None:
    store, text = made(pages=9), list[int]()
    slot = store.open()
    for number in range(18):
        before = append(store, slot, text, [number])
    swapped = store.swap_out(slot)
    store.check_integrity()
    filler = store.open()
    append(store, filler, [], [9] * 5)
    back = store.swap_in(swapped)
    store.check_integrity()
    seen = append(store, back, text, [77])
    coded = max(0, 18 - RESIDUAL) // PAGE * PAGE
    assert torch.allclose(seen["k"], expected(text, coded)["k"], rtol=1e-12, atol=1e-12)
    assert torch.equal(seen["v"][:8], before["v"][:8])


@pytest.mark.parametrize(
    ("field", "form", "message"),
    [
        (StateField("s", "sequence", (2, 2)), "int8/token", r"a\.s cannot be stored as int8/token: it is one state"),
        (StateField("s", "sequence", (2, 2)), "bf16", "it is one state a sequence"),
        (StateField("m", "memory", (2, 2)), "int4/channel", "it is a memory"),
        (StateField("c", "token", (8,)), "int4/token", "one scale for a whole latent"),
        (StateField("n", "token", ()), "int4/channel", "one number a token"),
        (StateField("i", "token", (2, 2), "float32"), "int4/channel", "declared as float32"),
        (StateField("w", "token", (2, 2), keep=5), "int4/channel", "window of 5 tokens is within the residual of 6"),
        (StateField("k", "token", (2, 6)), "int4/token:4", "groups of 4 do not divide the 6 channels"),
    ],
)
def test_fields_refuse_by_name(field: StateField, form: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(fields={"a": (field,)}, **{"*": form})


def test_globs_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'\*.q' matches no field; the fields are named k, v, x"):
        made(**{"*.q": "int4/token"})
    with pytest.raises(ValueError, match="residual: -1"):
        Formats({}, -1)
    with pytest.raises(ValueError, match="6 new tokens; room for 5 at once"):
        store = made()
        store.begin([store.open()], rows_step(torch.zeros(1, 6, dtype=torch.long)))


def test_windows_are_quantised_beyond_the_residual() -> None:
    lm, ids = model(("window", "full")), tokens(1, 30)
    rules = {"*.k": "int8/channel", "*.v": "int8/token"}
    store = Quantised(state_table(lm.spec), PageSize(1, 2, 40, 4), torch.float64, formats=Formats(rules, 2))
    slot = store.open()
    got = torch.cat([run(lm, store, [slot], rows_step(p, store.length(slot), horizon=64)) for p in ids.split(1, 1)])
    assert 0 < float((got - logits(lm, ids)[0]).abs().max()) < 0.05
    assert store.report()["whole_pages"] <= 2 * 3


@pytest.mark.parametrize(("kv", "bits"), [("int8", 8), ("int4", 4)])
def test_the_bill_is_of_a_scale_a_vector(kv: str, bits: int) -> None:
    """`assay bill --kv-dtype` counts a scale and a zero for every vector of a head: `token`, of all fields."""
    told = predict_quantised(
        state_table(spec(("full", "full"))), PageSize(1, 4, 9), "float32", Formats({"*": f"int{bits}/token"})
    )
    assert bill(spec(("full", "full")), Question(36, kv_dtype=kv)).state_bytes == told.stored

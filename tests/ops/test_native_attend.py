"""Compiled attention of decoding against the softmax in float64, and whole models on it against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.cache import PageSize, Size
from assay.engine.runner import Runner
from assay.model.lm import build
from assay.ops import native
from assay.ops.native import Kernels
from assay.spec.load import load_model
from tests.ops.natives import DTYPES, ROUND, drawn

floats = st.sampled_from(DTYPES)


@st.composite
def attentions(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw(st.integers(1, 4)),
        "groups": draw(st.integers(1, 3)),
        "shared": draw(st.integers(1, 6)),
        "entries": draw(st.sampled_from((1, 5, 16, 127, 128, 129, 300))),
        "size": draw(st.sampled_from((16, 48, 64, 128, 512))),
        "width": draw(st.sampled_from((16, 64, 128, 528))),
        "softcap": draw(st.sampled_from((None, 3.0))),
        "sink": draw(st.booleans()),
        "density": draw(st.sampled_from((0.02, 0.6, 1.0))),
    }


@given(attentions(), floats)
def test_attention_is_the_softmax_in_float64_to_the_rounding(
    kernels: Kernels, sizes: dict[str, Any], dtype: torch.dtype
) -> None:
    rows, groups, entries = sizes["rows"], sizes["groups"], sizes["entries"]
    heads = groups * sizes["shared"]
    # Keys and values as a store has them: wider rows than are read.
    k, v = (drawn(i, dtype, rows, entries + 7, groups, sizes[n])[:, :entries] for i, n in enumerate(("size", "width")))
    q, seen = drawn(2, dtype, rows, heads, sizes["size"]), drawn(3, torch.float32, rows, entries).abs() < 3
    seen &= torch.rand(rows, entries, generator=torch.Generator().manual_seed(4)) < sizes["density"]
    sink = drawn(5, dtype, heads) if sizes["sink"] else None
    found = kernels.attend(q, (k, v), seen, 0.3, sizes["softcap"], sink)
    assert found is not None
    z = torch.einsum("rhk,rshk->rhs", q.double(), k.double().repeat_interleave(sizes["shared"], 2)) * 0.3
    z = z if sizes["softcap"] is None else 3.0 * torch.tanh(z / 3.0)
    e = torch.where(seen[:, None], z.exp(), 0.0)
    whole = e.sum(-1, keepdim=True) + (0.0 if sink is None else sink.double().exp()[:, None])
    p = e / torch.where(whole > 0, whole, 1.0)
    exact = torch.einsum("rhs,rshv->rhv", p, v.double().repeat_interleave(sizes["shared"], 2))
    torch.testing.assert_close(found.double(), exact, rtol=ROUND[dtype], atol=2e-6)


@given(st.integers(1, 300), st.integers(0, 200), floats)
def test_attention_of_a_sequence_has_the_same_bits_in_any_company(
    kernels: Kernels, entries: int, more: int, dtype: torch.dtype
) -> None:
    """Other rows, a longer view of which it sees no more, and other threads change nothing."""
    k, v = drawn(0, dtype, 3, entries + more, 2, 32), drawn(1, dtype, 3, entries + more, 2, 16)
    q, seen = drawn(2, dtype, 3, 4, 32), torch.ones(3, entries + more, dtype=torch.bool)
    seen[1, entries:] = False
    alone = kernels.attend(q[1:2], (k[1:2, :entries], v[1:2, :entries]), torch.ones(1, entries, dtype=torch.bool), 0.2)
    torch.set_num_threads(3)
    try:
        together = kernels.attend(q, (k, v), seen, 0.2)
    finally:
        torch.set_num_threads(1)
    assert together is not None and alone is not None and torch.equal(together[1], alone[0])


@given(attentions(), st.sampled_from((1, 3, 16, 50)), st.integers(1, 9), floats)
def test_pages_in_any_order_have_the_bits_of_rows(
    kernels: Kernels, sizes: dict[str, Any], page: int, count: int, dtype: torch.dtype
) -> None:
    """A page may stand in several rows, and pages that nobody has are not read."""
    rows, groups = sizes["rows"], sizes["groups"]
    q, seen = (
        drawn(2, dtype, rows, groups * sizes["shared"], sizes["size"]),
        drawn(3, torch.float32, rows, page * count),
    )
    seen = torch.where(torch.arange(rows)[:, None] % 3 == 1, -1.0, seen) > -2 + 2 * sizes["density"]
    k, v = (drawn(i, dtype, 3 * count + 1, page, groups, sizes[n]) for i, n in enumerate(("size", "width")))
    table = torch.randint(3 * count, (rows, count), generator=torch.Generator().manual_seed(4))
    k[-1], v[-1] = float("nan"), float("nan")
    dense = tuple(t[table].flatten(1, 2) for t in (k, v))
    rule = (seen, 0.3, sizes["softcap"], drawn(5, dtype, q.shape[1]) if sizes["sink"] else None)
    found, expected = kernels.attend(q, (k, v), *rule, table), kernels.attend(q, dense, *rule)
    assert found is not None and expected is not None and torch.equal(found, expected)


def test_a_mean_of_two_values_is_rounded_to_the_nearest_and_ties_to_even(kernels: Kernels) -> None:
    v = drawn(0, torch.bfloat16, 1, 2, 1, 256)
    v[0, 1] = v[0, 0] * (1 + 2.0**-7)  # neighbours, or nearly: their mean is a tie
    q = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    found = kernels.attend(q, (torch.zeros(1, 2, 1, 16, dtype=torch.bfloat16), v), torch.ones(1, 2).bool(), 1.0)
    assert found is not None and torch.equal(found[0], v.float().mean(1)[0].bfloat16())


def test_what_is_stored_where_nobody_looks_is_not_read(kernels: Kernels) -> None:
    k, v = drawn(0, torch.float32, 1, 20, 1, 16), drawn(1, torch.float32, 1, 20, 1, 16)
    q, seen = drawn(2, torch.float32, 1, 1, 16), torch.arange(20)[None] < 9
    clean = kernels.attend(q, (k, v), seen, 1.0)
    k[:, 9:], v[:, 9:] = float("nan"), float("inf")
    dirty = kernels.attend(q, (k, v), seen, 1.0)
    assert clean is not None and dirty is not None and torch.equal(clean, dirty)
    nothing = kernels.attend(q, (k, v), seen & False, 1.0)
    assert nothing is not None and not nothing.any()
    for place in range(9):
        spoilt = kernels.attend(q, (k.index_fill(1, torch.tensor(place), float("nan")), v), seen, 1.0)
        assert spoilt is not None and spoilt.isnan().all(), place


MIXERS = {
    "plain": {},
    "window": {"blocks.block.mixer.sees": {"window": 5, "first": 1}},
    "capped": {"blocks.block.mixer.scores": {"softcap": 2.0, "sink": True}},
    "normed": {"blocks.block.mixer.qk_norm": {}, "blocks.block.norm.kind": {"kind": "rmsnorm", "weight": "plus_one"}},
}


@pytest.mark.parametrize("changes", MIXERS.values(), ids=MIXERS.keys())
@pytest.mark.parametrize("size", [Size(3, 40, 16), PageSize(3, 4, 30, 16)], ids=["rows", "pages"])
def test_a_model_decodes_through_the_kernels_as_through_torch(
    used: list[str], monkeypatch: pytest.MonkeyPatch, size: Size | PageSize, changes: dict[str, Any]
) -> None:
    small = {"d_model": 64, "layers": 2, "blocks.block.mixer.heads": 4, "blocks.block.ffn.width": 40}
    model = build(load_model("llama-11m", small | changes))
    found = native.kernels()
    ids = torch.randint(256, (3, 14), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [row[: 6 + i] for i, row in enumerate(ids)]
    logits = []
    for kernels in (None, found):
        monkeypatch.setattr(native, "kernels", lambda kernels=kernels: kernels)
        runner = Runner(model, size)
        slots = [runner.open(40) for _ in prompts]
        runner.feed(slots, prompts)
        logits.append(torch.stack([runner.feed(slots, [[row[9 + t]] for row in ids]) for t in range(4)]))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    assert {"linear", "rms_norm", "turn", "attend"} <= set(used)

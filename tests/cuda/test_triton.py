"""Triton's kernels against definitions in float64, on odd shapes: on a GPU, or without one in Triton's interpreter
(`TRITON_INTERPRET=1 pytest tests/cuda/test_triton.py`)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from assay.ops import packed, triton
from assay.ops.lanes import Lanes
from assay.ops.native.scans import Streams
from assay.ops.scan import decayed, delta
from assay.ops.sees import Sees
from assay.ops.state import Rows
from assay.ops.triton.attend import attend
from assay.ops.triton.launch import Launched
from assay.ops.triton.scan import MOST, scan
from tests.ops.cases import Problem, problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEAR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}  # the interpreter cuts off what bfloat16 has no bits for


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def near(found: Tensor | None, exact: Tensor, error: float) -> None:
    assert found is not None
    assert float((found.double().cpu() - exact.cpu()).norm()) <= error * float(exact.norm())


def in_pages(t: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The rows of t in shuffled pages with others between them, and the table; NaN where a page ends behind a row."""
    rows, entries = t.shape[:2]
    each = -(-entries // page)
    table = torch.randperm(rows * each + 2, generator=torch.Generator().manual_seed(5))[: rows * each]
    padded = torch.full((rows, each * page, *t.shape[2:]), torch.nan, dtype=t.dtype)
    padded[:, :entries] = t
    pool = torch.full((rows * each + 2, page, *t.shape[2:]), torch.nan, dtype=t.dtype)
    pool[table] = padded.view(-1, page, *t.shape[2:])
    return pool, table.view(rows, each)


def mask(p: Problem) -> Tensor:
    made = p.plan("matmul").mask
    assert made is not None
    return made[:, 0]


ATTENDED: list[dict[str, Any]] = [
    {"past": 6},
    {"past": 200, "heads": 6, "groups": 2, "size": 24, "width": 40, "sees": Sees(window=150), "with_sink": True},
    {"past": 130, "heads": 5, "groups": 1, "size": 17, "softcap": 1.5, "blank": 2},
    {"past": 257, "heads": 3, "groups": 3, "size": 64, "sees": Sees(window=9, first=2), "with_sink": True},
]


@pytest.mark.parametrize("how", ATTENDED, ids=str)
@pytest.mark.parametrize(("dtype", "page"), [(torch.float32, 0), (torch.float32, 16), (torch.bfloat16, 7)], ids=str)
def test_attention_is_the_oracle(how: dict[str, Any], dtype: torch.dtype, page: int) -> None:
    low = problem(rows=3, tokens=1, **how).to(dtype)
    p = replace(low, q=low.q.double(), k=low.k.double(), v=low.v.double())
    seen, rule, table = mask(p), low.scores, None
    k, v = low.k, low.v
    if page:
        (k, table), (v, _) = in_pages(k, page), in_pages(v, page)
        seen = torch.nn.functional.pad(seen, (0, table.shape[1] * page - seen.shape[1]))
        table = table.to(DEVICE)
    sink = None if rule.sink is None else rule.sink.to(DEVICE)
    pools = (k.to(DEVICE), v.to(DEVICE))
    found = attend(low.q.to(DEVICE), pools, seen.to(DEVICE), rule.scale, rule.softcap, sink, table)
    near(found, p.run("oracle"), NEAR[dtype])


def test_a_query_has_the_same_bits_in_any_company_and_view() -> None:
    q, k, v = drawn(0, 3, 4, 16), drawn(1, 3, 300, 2, 16), drawn(2, 3, 300, 2, 16)
    seen = torch.arange(300, device=DEVICE) < torch.tensor([[300], [140], [0]], device=DEVICE)
    together = attend(q, (k, v), seen, 0.25)
    alone = attend(q[1:2], (k[1:2, :150], v[1:2, :150]), seen[1:2, :150], 0.25)
    assert together is not None and alone is not None
    assert torch.equal(together[1], alone[0]) and torch.equal(together[2], torch.zeros_like(together[2]))


def test_what_is_not_a_number_stays_visible_where_it_is_seen() -> None:
    q, k, v = drawn(0, 2, 2, 16), drawn(1, 2, 200, 2, 16), drawn(2, 2, 200, 2, 16)
    k[:, 150] = torch.nan
    seen = torch.ones(2, 200, dtype=torch.bool, device=DEVICE)
    seen[1, 150] = False
    found = attend(q, (k, v), seen, 0.25)
    assert found is not None and found[0].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize("bits", packed.BITS)
@pytest.mark.parametrize(("rows", "size", "out"), [(1, 32, 16), (3, 70, 33), (19, 300, 40), (70, 33, 5)])
def test_packed_products_are_those_of_the_definition(bits: int, rows: int, size: int, out: int) -> None:
    """The interpreter rounds a fused multiply-add twice, so that a few roundings of float32 are let through."""
    x, b, w = drawn(0, rows, size), drawn(1, out), packed.pack(drawn(2, out, size), bits)
    found = Launched().packed(x, [(w, b), (w, None)])
    assert found is not None
    exact = packed.product(x, w).double()
    near(found[0], exact + b.double(), 1e-6)
    near(found[1], exact, 1e-6)


def test_groups_that_are_small_or_not_finite() -> None:
    x, w = drawn(0, 5, 64), packed.pack(drawn(1, 20, 64), 8)
    x[1, 3], x[2, 40], x[3], x[4] = torch.nan, torch.inf, 2.0**-120, 0.0
    x[3, 32:] = 1.0
    found = Launched().packed(x, [(w, None)])[0]
    exact = packed.product(x, w)
    assert found[1:3].isnan().all() and exact[1:3].isnan().all()
    near(found[[0, 3, 4]], exact[[0, 3, 4]].double(), 1e-6)


@pytest.mark.parametrize("bits", packed.BITS)
def test_rows_of_experts(bits: int) -> None:
    x, w = drawn(0, 7, 40), packed.pack(drawn(1, 4, 20, 40), bits)
    counts = torch.tensor([2, 0, 4, 1], device=DEVICE)
    exact = torch.cat([packed.product(x[i : i + 1], w.each()[e]) for i, e in enumerate((0, 0, 2, 2, 2, 2, 3))])
    near(Launched().grouped(x, w, counts), exact.double(), 1e-6)


def rows(keys: int, values: int) -> Rows:
    return Rows(drawn(9, 3, 4, keys, values), torch.tensor([2, 0], device=DEVICE))


@pytest.mark.parametrize("form", ["none", "head", "channel", "rank one"])
def test_corrected_recurrences_are_the_definition(form: str) -> None:
    q, k = drawn(0, 2, 5, 2, 20) / 4, drawn(1, 2, 5, 2, 20) / 4
    v, beta, past = drawn(2, 2, 5, 4, 37), drawn(3, 2, 5, 4).sigmoid(), rows(20, 37)
    decay = {"none": None, "head": -drawn(4, 2, 5, 4).abs()}.get(form, -drawn(5, 2, 5, 4, 20).abs())
    updates = delta.delta_rule(q, k, v, beta, decay)
    if form == "rank one":
        q, a, b, k = (drawn(n, 2, 5, 4, 20) / 4 for n in range(4))
        assert decay is not None
        updates = delta.rank_one(q, (a, b), k, v, decay)
    found = scan(past, updates.streams(), updates.late)
    assert found is not None
    out, end = delta.recurrent(updates.each(torch.Tensor.double), past.read().double())
    near(found[0], out, 1e-6)
    near(found[1], end, 1e-6)


@pytest.mark.parametrize("form", ["none", "head", "channel"])
def test_decayed_recurrences_are_the_definition(form: str) -> None:
    q, k, v, past = drawn(0, 2, 6, 4, 9), drawn(1, 2, 6, 4, 9), drawn(2, 2, 6, 4, 40), rows(9, 40)
    decay = {"none": None, "head": -drawn(3, 2, 6, 4).abs(), "channel": -drawn(3, 2, 6, 4, 9).abs()}[form]
    found = scan(past, Streams(q, k, v, decay))
    whole = torch.zeros(2, 6, 4, 9) if decay is None else decay.view(2, 6, 4, -1).expand(2, 6, 4, 9)
    given = (t.double().to(DEVICE) for t in (q, k, v, whole))
    out, end = decayed.recurrent(*given, past.read().double(), Lanes(2, 6))
    assert found is not None
    near(found[0], out, 1e-6)
    near(found[1], end, 1e-6)


def test_state_spaces_take_steps_and_let_values_pass() -> None:
    q, k, v, past = drawn(0, 2, 4, 1, 16), drawn(1, 2, 4, 1, 16), drawn(2, 2, 4, 4, 32), rows(16, 32)
    dt, skip = drawn(3, 2, 4, 4).abs(), drawn(4, 4)
    found = scan(past, Streams(q, k, v, -dt, rate=dt, skip=skip[None, None]))
    state, outs = past.read().double(), []
    for t in range(4):
        written = k[:, t, :, :, None] * (dt[:, t, :, None] * v[:, t])[:, :, None].double()
        state = (-dt[:, t].double()).exp()[..., None, None] * state + written
        outs.append((q[:, t, :, :, None] * state).sum(2) + skip[:, None] * v[:, t])
    assert found is not None
    near(found[0], torch.stack(outs, 1), 1e-6)
    near(found[1], state, 1e-6)


def test_what_they_do_not_serve_is_left_to_torch() -> None:
    x, seen = drawn(0, 2, 2, 16), torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    k = drawn(1, 2, 9, 2, 16)
    assert attend(x.double(), (k.double(), k.double()), seen, 1.0) is None
    assert attend(x, (k, k.bfloat16()), seen, 1.0) is None
    assert Launched().packed(x.double(), []) is None
    long = drawn(2, 2, MOST + 1, 4, 8)
    assert scan(rows(8, 8), Streams(long, long, long)) is None
    assert scan(rows(8, 8), Streams(long[:, :3].double(), long[:, :3], long[:, :3])) is None


def test_a_process_compares_them_with_torch_and_does_without_what_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton, "ENVIRONMENT", replace(triton.ENVIRONMENT, native=True))
    triton.kernels.cache_clear()
    assert triton.kernels(DEVICE) is not None and capsys.readouterr().err == ""
    triton.kernels.cache_clear()
    monkeypatch.setattr("assay.ops.triton.launch.scan", lambda *given: [t + 1 for t in scan(*given) or ()])
    assert triton.kernels(DEVICE) is None and triton.kernels(DEVICE) is None
    said = capsys.readouterr().err
    triton.kernels.cache_clear()
    assert said.count("\n") == 1 and "scan" in said

"""`assay bench --profile`: what it names, counts and adds up to."""

from __future__ import annotations

import pytest
import torch

from assay.measure.profile import Spent, by_torch, profiled, table, where
from assay.measure.serving import Load, Serving
from assay.model.lm import build
from assay.ops import native
from assay.ops.native import Kernels, Unbuildable
from assay.spec.load import load_model

SMALL = {"d_model": 64, "layers": 3, "blocks.block.mixer.heads": 4, "blocks.block.ffn.width": 48}


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
def test_decoding_is_told_by_kernels_with_their_number_of_calls(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    try:
        found = Kernels(native.library()) if compiled else None
    except Unbuildable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(native, "kernels", lambda: found)
    rows = profiled(Serving(build(load_model("llama-11m", SMALL)), Load(2, 60, 40, read=20)), 12)
    decode = {row["kernel"]: row for row in rows if row["phase"] == "decode"}
    if compiled:
        own = {"assay::attend": 3, "assay::rms_norm": 7, "assay::put": 6, "assay::turn": 6}
        assert {name: decode[name]["calls"] for name in own} == own
        assert all(row["where"] == "own" for name, row in decode.items() if name.startswith("assay::"))
    else:
        # q, k, v, the mix's map, three of the ffn in each of three layers, and the head.
        assert sum(decode[name]["calls"] for name in ("aten::mm", "aten::addmm") if name in decode) == 3 * 7 + 1
    for phase in ("prefill", "decode"):
        shares = [row["share"] for row in rows if row["phase"] == phase]
        assert abs(sum(shares) - 1) < 0.02 and rows[-1]["kernel"] == "between the calls"
    assert len(table(rows, 0.0)) == len(rows) + 1


def test_a_product_is_named_by_the_library_that_makes_it() -> None:
    assert where("aten::mm", torch.float32) == "BLAS" and where("aten::addmm", torch.bfloat16) == "oneDNN"
    assert (
        where("mkldnn::_linear_pointwise", torch.float32) == "oneDNN" and where("aten::silu", torch.float32) == "aten"
    )


def test_self_times_of_a_known_call_fill_its_wall_time() -> None:
    a = torch.randn(400, 400)
    spent: Spent = by_torch(lambda: [a @ a for _ in range(5)], 2)
    assert spent.calls["aten::mm"] == 10 and 0 < spent.seconds["aten::mm"] <= spent.wall

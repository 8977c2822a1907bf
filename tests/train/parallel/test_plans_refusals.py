"""A part that cannot be dealt out so says it by name, before a tensor exists."""

from __future__ import annotations

from typing import Any

import pytest

from assay.spec.shard import deal
from assay.train.parallel.spec import ParallelSpec
from tests.train.parallel.plans import model

GQA: dict[str, Any] = {"kind": "gqa", "heads": 4, "position": "rope"}


@pytest.mark.parametrize(
    ("mixer", "more", "sizes", "told"),
    [
        ({"kind": "mamba2", "heads": 2, "head_dim": 8}, {}, {"tensor": 2}, "mamba2: tensor=2 .* 1 are not cut in two"),
        (GQA | {"heads": 6, "kv_heads": 2, "head_dim": 4}, {"vocab": 33}, {"tensor": 3},
         r"6 pieces; accepted: tensor in 1, 2, 6"),
        ({"kind": "s4d", "modes": 2}, {}, {"tensor": 2}, "s4d: tensor=2 .* its gate stands behind the sum"),
        (GQA | {"scores": {"dropout": 0.1}}, {}, {"tensor": 2}, "blocks.0.mixer: mixer gqa: tensor=2"),
        (GQA | {"qk_norm": {"over": "full"}}, {}, {"tensor": 2}, "accepted: tensor=1"),
        (GQA, {"vocab": 33}, {"tensor": 2}, "embed: embed token: tensor=2 .* 33 pieces"),
        (GQA, {"head": {"kind": "mlm"}}, {"tensor": 2}, "head: head mlm"),
        (GQA, {}, {"expert": 2}, "parallel.expert: 2; the model has no experts"),
        ({"kind": "gqa", "heads": 4, "position": "a"}, {"positions": {"a": {"kind": "alibi", "heads": 4}}},
         {"tensor": 2}, "positions.a: position alibi"),
    ],
)  # fmt: skip
def test_what_cannot_be_dealt_out_is_named(
    mixer: dict[str, Any], more: dict[str, Any], sizes: dict[str, int], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        deal(model(mixer, **more), sizes)


def test_experts_that_the_ranks_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"ffn moe: expert=3 .* 4 pieces; accepted: expert in 1, 2, 4"):
        deal(model(GQA, {"kind": "moe", "experts": 4, "width": 8}), {"expert": 3})


def test_what_nothing_cuts_is_not_kept_on_the_host() -> None:
    with pytest.raises(ValueError, match=r"offload: true keeps on the host what `shard` cuts, which is 1"):
        ParallelSpec(data=2, offload=True)


def test_tokens_without_ranks_to_spread_them_over() -> None:
    with pytest.raises(ValueError, match=r"sequence: true spreads tokens over the ranks of `tensor`, which is 1"):
        ParallelSpec(sequence=True)

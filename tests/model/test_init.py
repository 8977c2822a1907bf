"""Initial weights: keyed draws, spreads as declared, and what a new model computes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from assay.model.init import draw, initialise
from assay.model.lm import build, weight_table
from assay.ops.step import rows_step
from assay.spec.base import Init, Weight
from tests.model.small import ids, spec


def weights(seed: int = 0, **changes: object) -> dict[str, Tensor]:
    return dict(build(spec(**changes), seed).state_dict())  # type: ignore[arg-type]


def test_adding_a_module_moves_no_other_draw() -> None:
    """A layer, a norm, a gate, another scheme: every weight that both have is bit for bit the same."""
    init = {"std": 0.02, "depth": False}  # not divided by the depth, which the added layer changes
    base = weights(init=init)
    for more in (
        {"layers": 3},
        {"block": {"norm": {"place": "sandwich"}}},
        {
            "block": {
                "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "p", "gate": "head", "bias": "all"}
            }
        },
        {"positions": {"p": "rope", "q": "learned"}},
        {"final_norm": None},
    ):
        other = weights(init=init, **more)
        shared = base.keys() & other.keys()
        assert len(shared) > 10 and base.keys() ^ other.keys()
        assert all(torch.equal(base[n], other[n]) for n in shared)


def test_draws_depend_on_seed_and_name_alone() -> None:
    a, b, c = (draw(Init(), (4, 4), s, n) for s, n in ((0, "x"), (0, "y"), (1, "x")))
    assert not torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(123)
    assert torch.equal(a, draw(Init(), (4, 4), 0, "x"))
    assert not torch.equal(draw(Init(), (4, 4), 1, "0:x"), draw(Init(), (4, 4), 10, "x"))


@pytest.mark.parametrize(
    ("init", "std", "limit"), [(Init("normal", 0.3), 0.3, 9.0), (Init("uniform", 0.3), 0.3 / 3**0.5, 0.3)]
)
def test_spread_of_a_draw(init: Init, std: float, limit: float) -> None:
    """A hundred thousand numbers: the mean within 4 standard errors of 0, the spread within 1 percent."""
    x = draw(init, (100_000,), 0, "x")
    assert abs(float(x.mean())) < 4 * std / 100_000**0.5
    assert math.isclose(float(x.std()), std, rel_tol=0.01) and float(x.abs().max()) <= limit * (1 + 1e-6)
    assert torch.equal(draw(Init.constant(0.7), (3,), 0, "x"), torch.full((3,), 0.7))


@pytest.mark.parametrize(
    ("init", "matrix", "out", "embed"),
    [
        ({}, 0.02, 0.02 / math.sqrt(2 * 4), 64**-0.5),
        ({"std": 0.1, "embed": 0.3}, 0.1, 0.1 / math.sqrt(2 * 4), 0.3),
        ({"depth": False}, 0.02, 0.02, 64**-0.5),
        ({"std": "fan_in"}, 64**-0.5, None, 64**-0.5),
        ({"zero_out": True}, 0.02, 0.0, 64**-0.5),
    ],
)
def test_declared_spreads(init: dict[str, object], matrix: float, out: float | None, embed: float) -> None:
    """GPT-2's 0.02, divided by sqrt(2 layers) where it writes to the stream; fan_in is the input's own size."""
    block = {"mixer": {"kind": "gqa", "heads": 4}, "ffn": {"kind": "dense", "width": 256, "bias": True}}
    made = weights(block=block, d_model=64, layers=4, vocab=256, init=init)
    sizes = {"mixer.q": matrix, "ffn.up": matrix, "mixer.out": out, "ffn.down": out}
    if out is None:
        sizes |= {"mixer.out": 64**-0.5 / math.sqrt(8), "ffn.down": 256**-0.5 / math.sqrt(8)}
    for name, std in sizes.items():
        together = torch.cat([made[f"blocks.{i}.{name}.weight"].flatten() for i in range(4)])
        assert math.isclose(float(together.std()), std or 0.0, rel_tol=0.03), name
    assert math.isclose(float(made["embed.weight"].std()), embed, rel_tol=0.03)
    assert torch.equal(made["blocks.0.ffn.up.bias"], torch.zeros(256))
    assert torch.equal(made["blocks.0.mixer_norm.weight"], torch.ones(64))


@pytest.mark.parametrize("parallel", ["no", "own", "shared"])
def test_zero_out_makes_every_block_the_identity(parallel: str) -> None:
    lm = build(spec({"parallel": parallel}, init={"zero_out": True}))
    taps = lm(rows_step(ids(6)[None], listen=frozenset(["*"]))).taps
    for layer in range(2):
        assert torch.equal(taps[f"blocks.{layer}.out"], taps["blocks.0.in"])
    plain = build(spec({"parallel": parallel}))(rows_step(ids(6)[None], listen=frozenset(["*"]))).taps
    assert not torch.equal(plain["blocks.0.out"], plain["blocks.0.in"])


def test_deepnorm_shrinks_what_it_names() -> None:
    """beta = (8 N)^-1/4 on values, outputs and the feed-forward maps; queries and keys keep their spread."""
    deep = {"residual": {"kind": "post", "deep": True}, "norm": {"place": "post"}}
    table, plain = weight_table(spec(deep, layers=12)), weight_table(spec({"norm": {"place": "post"}}, layers=12))
    ratio = {n.split(".", 2)[2]: table[n].init.std / plain[n].init.std for n in table if n.startswith("blocks.7.")
             and table[n].init.std}  # fmt: skip
    beta = 96**-0.25
    names = {"mixer.q": 1.0, "mixer.k": 1.0, "mixer.v": beta, "mixer.out": beta}
    names |= {f"ffn.{n}": beta for n in ("gate", "up", "down")}
    assert ratio.keys() == {f"{n}.weight" for n in names}
    assert all(math.isclose(ratio[f"{n}.weight"], want) for n, want in names.items())


def test_tables_and_modules_that_differ_are_our_bug() -> None:
    lm = build(spec())
    for table in (
        {},
        {**weight_table(spec()), "more": Weight((1,))},
        {**weight_table(spec()), "embed.weight": Weight((1,))},
    ):
        with pytest.raises(AssertionError, match=r"differ|embed"):
            initialise(lm, table, 0)

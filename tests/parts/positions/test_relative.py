"""KERPLE, FIRE, Shaw, Transformer-XL and CoPE: against their references, one another, and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from assay.model.lm import build
from assay.ops.step import Layout, View, rows_step
from assay.parts.base import Position
from assay.parts.positions import fire, kerple, shaw, transformer_xl
from assay.parts.positions.alibi import slopes
from assay.parts.positions.fire import Fire
from assay.parts.positions.kerple import Kerple
from assay.parts.positions.shaw import Shaw
from assay.parts.positions.transformer_xl import TransformerXl
from assay.spec.base import PositionSpec, Site
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from tests.parts.small import close, part, put, rows

Q_POS, K_POS = torch.tensor([4, 5, 40]), torch.tensor([0, 3, 5, 39])
SITE = Site("positions.here", 0, 1, 16, 16, (), 64)


def built(spec: PositionSpec) -> tuple[Position, dict[str, Tensor]]:
    made: Position = spec.build(SITE).double()
    for n, p in enumerate(made.parameters()):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(n))
    return made, {name: p.detach() for name, p in made.named_parameters()}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The same places in every shape that a backend tells them in, for scores [2, H, T, S]."""
    assert z.dim() == 4
    wide = Q_POS.expand(2, 1, 3), K_POS.expand(2, 1, 4)
    return [wide, (wide[0][:, 0], wide[1][:, 0]), (Q_POS, K_POS)]


BIASES: list[tuple[Any, PositionSpec]] = [
    (kerple, Kerple(heads=6)),
    (kerple, Kerple(heads=6, form="power")),
    (fire, Fire(heads=6, width=5, length=9)),
    (fire, Fire(heads=6, width=3, length=80, curve=0.5)),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("module", "spec"), BIASES)
def test_biases_of_places_equal_the_reference(module: Any, spec: PositionSpec, sign: int) -> None:
    made, weights = built(spec)
    for weight in weights.values():
        weight.mul_(sign)
    z, q = noise(2, 6, 3, 4), noise(2, 6, 3, 8)
    expected = z + module.reference(spec, weights, Q_POS, K_POS, 6)
    for told in places(z):
        close(made.bias().tile(z, q, *told).detach(), expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("spec", [Shaw(head_dim=8, reach=4), Shaw(head_dim=8, reach=38, bidirectional=True)])
def test_relative_keys_equal_the_reference(spec: Shaw) -> None:
    made, weights = built(spec)
    z, q = noise(2, 6, 3, 4), noise(2, 6, 3, 8, seed=1)
    expected = torch.stack([shaw.reference(spec, weights, x.transpose(0, 1), Q_POS, K_POS) for x in q]) + z
    for told in places(z):
        close(made.bias().tile(z, q, *told).detach(), expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("dim", [None, 6])
def test_transformer_xl_is_its_four_terms(dim: int | None) -> None:
    spec = TransformerXl(heads=6, head_dim=8, dim=dim, theta=100.0)
    made, weights = built(spec)
    q, k = noise(3, 6, 8, seed=1), noise(4, 6, 8, seed=2)
    layout = Layout(K_POS[None] * 0, K_POS[None], K_POS[None], True)
    asked, view = made.on_read(q, View({"k": k[None]}, layout), rows_step(torch.zeros(1, 3, dtype=torch.long)))
    asked = asked.transpose(0, 1)
    z = asked @ view.dense("k")[0].permute(1, 2, 0) / 8**0.5
    expected = transformer_xl.reference(spec, weights, q, k, Q_POS, K_POS)
    for q_pos, k_pos in ((Q_POS[None], K_POS[None]), (Q_POS, K_POS)):
        close(made.bias().tile(z, asked, q_pos, k_pos).detach(), expected)  # type: ignore[union-attr]


def test_a_power_of_one_is_alibi() -> None:
    made, _ = built(Kerple(heads=6, form="power"))
    with torch.no_grad():
        made.strength.copy_(slopes(6).log())
        made.bend.zero_()
    d = torch.arange(50)
    close(made.by_distance(d).detach(), -slopes(6).double()[:, None] * d, 1e-6)  # slopes are float32


def test_fire_is_by_distance_up_to_its_threshold_alone() -> None:
    made, _ = built(Fire(heads=2, length=20))
    with torch.no_grad():
        made.stretch.fill_(1.0)
    zero, q = torch.zeros(2, 1, 1, dtype=torch.float64), torch.zeros(2, 1, 4)

    def at(i: int, j: int) -> Tensor:
        return made.bias().tile(zero, q, torch.tensor([i]), torch.tensor([j])).detach()  # type: ignore[union-attr]

    close(at(20, 11), at(9, 0))
    assert not torch.allclose(at(60, 51), at(20, 11), atol=1e-6)
    close(at(60, 0), at(1000, 0))  # a share of 1, however long the text


SCHEMES: dict[str, dict[str, Any]] = {
    "kerple": {"kind": "kerple", "heads": 2},
    "shaw": {"kind": "shaw", "head_dim": 8, "reach": 4},
    "transformer_xl": {"kind": "transformer_xl", "heads": 2, "head_dim": 8},
}


def tree(position: dict[str, Any] | None, mixer: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "d_model": 16,
        "vocab": 13,
        "layers": 2,
        "context": 12,
        "init": {"std": 0.5},
        "positions": {} if position is None else {"here": position},
        "blocks": {
            "b": {
                "mixer": {"kind": "gqa", "heads": 2, "position": "here", **(mixer or {})},
                "ffn": {"kind": "gated", "width": 24},
            }
        },
    }


@pytest.mark.parametrize("kind", SCHEMES)
def test_scores_do_not_move_with_the_text(kind: str) -> None:
    """The same logits wherever the positions start, and others where all tokens stand at one place."""
    model = build(validate(ModelSpec, tree(SCHEMES[kind]), "test")).double()
    step = rows_step(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]))
    plain = model(step).logits
    close(model(step.with_(positions=step.positions + 1000)).logits, plain, 1e-10)
    assert not torch.allclose(model(step.with_(positions=step.positions * 0)).logits, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("position", "said"),
    [
        (SCHEMES["kerple"] | {"heads": 4}, "`heads: 4`, but the layer has 2 query heads"),
        ({"kind": "fire", "heads": 4}, "`heads: 4`, but the layer has 2 query heads"),
        (SCHEMES["shaw"] | {"head_dim": 4}, "`head_dim: 4`, but the layer tells it of 8 dimensions"),
        (SCHEMES["transformer_xl"] | {"dim": 3}, "`dim` is 3"),
    ],
)
def test_what_does_not_fit_is_refused(position: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        validate(ModelSpec, tree(position), "test")


@pytest.mark.parametrize(
    ("kind", "said"),
    [("shaw", "queries of 16 dimensions; accepted: 8"), ("transformer_xl", "accepted: `heads` x `head_dim`")],
)
def test_latent_attention_is_refused(kind: str, said: str) -> None:
    """Its queries carry parts without a position, which neither scheme knows of."""
    mixer = {"kind": "mla", "heads": 2, "kv_rank": 8, "nope_dim": 8, "rope_dim": 8, "value_dim": 8}
    model = build(validate(ModelSpec, tree(SCHEMES[kind], mixer), "test"))
    with pytest.raises(ValueError, match=said):
        model(rows_step(torch.tensor([[3, 1, 4]])))


def test_gates_that_are_open_count_every_key() -> None:
    """With all gates at 1 a key d back stands at place d + 1: a table of distances. Gates at 0 leave all at place 0."""
    c = part("mixers", "cope", heads=1, limit=4, head_dim=2)
    weights = {f"{n}__weight": torch.zeros_like(c.part.get_parameter(f"{n}.weight")) for n in "qkv"}
    weights["q__weight"][0, 0] = weights["v__weight"][0, 2] = 1.0
    weights["k__weight"][0, 1] = 1.0
    put(c, **weights, out__weight=torch.eye(32, 2), places=torch.tensor([[5.0, 0], [1.0, 0], [2.0, 0], [-1.0, 0]]))
    x = torch.zeros(6, 32, dtype=torch.float64)
    x[:, 0], x[:, 2] = 1.0, torch.arange(6.0)
    for key, table in ((60.0, [1.0, 2.0, -1.0, -1.0, -1.0, -1.0]), (-60.0, [5.0] * 6)):
        x[:, 1] = key
        found = c.run(x, rows(1, 6))[:, 0]
        for i in range(6):
            z = torch.tensor([table[i - j] for j in range(i + 1)], dtype=torch.float64)
            close(found[i].detach(), z.softmax(0) @ torch.arange(i + 1.0, dtype=torch.float64), 1e-9)


def test_contextual_positions_refuse_what_they_cannot_count() -> None:
    for fields, said in (
        ({"sees": {"causal": False}}, "accepted: causal rules"),
        ({"scores": {"dropout": 0.1}}, "0 accepted"),
        ({"position": "here"}, "null is accepted"),
    ):
        with pytest.raises(ValueError, match=said):
            part("mixers", "cope", heads=2, **fields)


def test_relative_values_at_one_distance() -> None:
    """Where only itself is seen, a token gets its own value and the vector of distance 0."""
    c = part("mixers", "relative_values", heads=2, reach=3, sees={"window": 1})
    x = noise(5, 32)
    v = c.part.v.weight @ x.T
    expected = c.part.out.weight @ (v + c.part.relative[0].repeat(2)[:, None])
    close(c.run(x, rows(1, 5)), expected.T)

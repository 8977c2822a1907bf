"""Every variant of the experts against a dense loop over all of them, and against Hugging Face's modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from assay.conform.cases import Case, noise
from assay.ops.here import Here
from assay.spec.registry import get
from tests.parts.small import D, close, part, put, rows, x

STEP = rows(2, 6)
SIGMOID = {"kind": "topk", "k": 2, "score": "sigmoid", "renormalise": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "gated": {},
    "plain": {"gated": False, "act": "relu2"},
    "biases": {"bias": True},
    "clamped": {"bias": True, "clamp": {"limit": 0.7, "alpha": 1.3}},
    "scaled input": {"input_scaled": True, "bias": True, "router": SIGMOID},
    "latent": {"latent": 12, "bias": True},
    "shared": {"shared": {"kind": "gated", "width": 9, "share": True}, "router": {"kind": "topk", "k": 5}},
}


def moe(**fields: Any) -> Case:
    return part("ffns", "moe", **{"experts": 5, "width": 8, **fields})


def one(c: Case, e: int, z: Tensor) -> Tensor:
    """Expert e on every row."""
    spec: Any = c.spec
    w = dict(c.part.named_parameters())
    maps = {n: (lambda v, n=n: v @ w[n][e].T + (w[f"{n}_bias"][e] if spec.bias else 0)) for n in spec.maps}
    if not spec.gated:
        return maps["down"](maps["up"](z).relu() ** 2)
    gate, up = maps["gate"](z), maps["up"](z)
    if spec.clamp is None:
        return maps["down"](torch.nn.functional.silu(gate) * up)
    gate, up = gate.clamp(max=spec.clamp.limit), up.clamp(-spec.clamp.limit, spec.clamp.limit)
    return maps["down"]((up + 1) * gate * torch.sigmoid(spec.clamp.alpha * gate))


def all_experts(c: Case, tokens: Tensor) -> Tensor:
    """Every expert on every token, weighed by its share, which is nothing where it was not chosen."""
    spec: Any = c.spec
    choice, share = c.part.router(tokens, STEP, Here("part.router", {}, {}, {}, frozenset()))
    weights = torch.zeros(len(tokens), spec.experts, dtype=tokens.dtype).scatter(1, choice, share)
    z = tokens if spec.latent is None else c.part.into(tokens, STEP)
    total = torch.zeros_like(z)
    for e in range(spec.experts):
        weight, chosen = weights[:, e, None], (choice == e).any(1)[:, None]
        total = total + (chosen * one(c, e, weight * z) if spec.input_scaled else weight * one(c, e, z))
    y = total if spec.latent is None else c.part.back(total, STEP)
    beside = spec.shared is not None
    return y + c.part.shared(tokens, STEP, Here("part.shared", {}, {}, {}, frozenset())) if beside else y


@pytest.mark.parametrize("name", VARIANTS)
def test_sorted_groups_equal_the_dense_loop(name: str) -> None:
    """Outputs and the gradients of the input and of every weight, in float64."""
    c = moe(**VARIANTS[name])
    probe, mine, theirs = noise((12, D), 9), x().requires_grad_(), x().requires_grad_()
    learned = [p for p in c.part.parameters() if p.requires_grad]
    a, b = c.run(mine, STEP), all_experts(c, theirs)
    close(a, b)
    first = torch.autograd.grad((a * probe).sum(), [mine, *learned])
    second = torch.autograd.grad((b * probe).sum(), [theirs, *learned])
    for p, q in zip(first, second, strict=True):
        close(p, q)
        assert q.abs().max() > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_is_dropped(name: str) -> None:
    """Every token to one expert, which others would overflow: each still gets all of it."""
    fields = {**VARIANTS[name], "router": {"kind": "topk", "k": 1, "select_bias": True, "score": "sigmoid"}}
    c = moe(**fields)
    put(c, router__select_bias=torch.tensor([0.0, 0, 9, 0, 0]))
    close(c.run(x(), STEP), all_experts(c, x()))
    if name in ("gated", "plain", "biases", "clamped"):
        close(c.run(x(), STEP), one(c, 2, x()))


@pytest.mark.parametrize("bias", [False, True])
def test_copies_of_a_dense_network_are_that_network(bias: bool) -> None:
    """Sparse upcycling (2212.05055): where it starts, nothing has changed."""
    dense = part("ffns", "gated", width=8, bias=bias)
    c = moe(bias=bias)
    w = dense.weights()
    kinds = {"": "weight", "_bias": "bias"} if bias else {"": "weight"}
    copies = {f"{n}{ours}": w[f"{n}.{theirs}"] for n in ("gate", "up", "down") for ours, theirs in kinds.items()}
    put(c, **{name: t.expand_as(c.weights()[name]) for name, t in copies.items()})
    close(c.run(x(), STEP), dense.run(x(), STEP))


def test_equals_qwen2_moe() -> None:
    """A shared expert under a sigmoid of its own; shares that do not sum to one."""
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = hf.Qwen2MoeConfig(hidden_size=D, shared_expert_intermediate_size=9, **experts)
    theirs = Qwen2MoeSparseMoeBlock(config).double()
    shared = {"kind": "gated", "width": 9, "share": True}
    c = moe(shared=shared, router={"kind": "topk", "k": 2, "renormalise": False})
    w = c.weights()
    given = {"gate.weight": w["router.map.weight"], "shared_expert_gate.weight": w["shared.share.weight"]}
    given |= {f"shared_expert.{n}_proj.weight": w[f"shared.{n}.weight"] for n in ("gate", "up", "down")}
    given |= {"experts.gate_up_proj": torch.cat([w["gate"], w["up"]], 1), "experts.down_proj": w["down"]}
    theirs.load_state_dict(given)
    close(c.run(x(), STEP), theirs(x()[None])[0], 1e-6)


def test_equals_nemotron_h() -> None:
    """Experts without a gate between two maps that all of them share, and a shared one at the full width."""
    experts: dict[str, Any] = {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "n_group": 3,
    }
    experts |= {"moe_latent_size": 12, "moe_shared_expert_intermediate_size": 9, "mlp_hidden_act": "relu2"}
    config = hf.NemotronHConfig(hidden_size=D, topk_group=2, routed_scaling_factor=2.5, **experts)
    theirs = NemotronHMoE(config).double()
    router = {"kind": "topk", "score": "sigmoid", "groups": {"count": 3, "top": 2}, "select_bias": True, "scale": 2.5}
    shared = {"kind": "dense", "width": 9, "act": "relu2"}
    c = moe(experts=6, router=router, shared=shared, latent=12, gated=False, act="relu2")
    w = c.weights()
    given = {"gate.weight": w["router.map.weight"], "gate.e_score_correction_bias": w["router.select_bias"]}
    given |= {"experts.up_proj": w["up"], "experts.down_proj": w["down"]}
    given |= {"fc1_latent_proj.weight": w["into.weight"], "fc2_latent_proj.weight": w["back.weight"]}
    given |= {f"shared_experts.{n}_proj.weight": w[f"shared.{n}.weight"] for n in ("up", "down")}
    theirs.load_state_dict(given)
    close(c.run(x(), STEP), theirs(x()[None])[0], 1e-5)


def test_parameters_of_the_variants() -> None:
    """Total, active and FLOPs by hand: 6 experts of which 2 act, biases, latent maps, a shared network, the router."""
    c = moe(
        experts=6, bias=True, latent=12, shared={"kind": "gated", "width": 9}, router={"kind": "topk", "bias": True}
    )
    table = c.spec.weights(c.site).values()
    expert, vectors = 3 * 12 * 8, 8 + 8 + 12
    rest = 2 * 12 * D + 3 * D * 9 + 6 * D
    assert sum(w.numel for w in table) == 6 * (expert + vectors) + rest + (12 + D) + 6
    assert round(sum(w.numel * w.active for w in table)) == 2 * (expert + vectors) + rest + (12 + D) + 6
    assert sum(w.flops for w in table) == 2 * (2 * expert + rest)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"clamp": {}, "act": "gelu"}, ["`clamp`", "'gelu'"]),
        ({"clamp": {}, "gated": False}, ["`clamp`", "`gated` False"]),
        ({"norm": "batchnorm"}, ["'batchnorm'", "rmsnorm, layernorm"]),
        ({"router": {"kind": "topk", "k": 6}}, ["`k` (6)", "5 experts"]),
    ],
)
def test_refusals(fields: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ValueError) as told:
        moe(**fields)
    assert all(word in str(told.value) for word in says), told.value


def test_defaults_are_what_they_were() -> None:
    """Fields that came later leave the first form alone: no weight more, no key in its canonical form."""
    spec = get("ffns", "moe").model_validate({"kind": "moe", "experts": 4, "width": 8})
    assert set(moe(experts=4).weights()) == {"gate", "up", "down", "router.map.weight"}
    assert spec == moe(experts=4).spec

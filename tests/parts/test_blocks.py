"""DyT, value residual, hyper-connections, nGPT and product keys: identities, closed forms, stacks of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from assay.cache.cache import Cache
from assay.cache.size import Size
from assay.model.lm import LM, state_table
from assay.ops.step import rows_step
from assay.parts.mixers import value_residual
from assay.passes.quantise import quantise
from tests.model.small import VOCAB, ids, logits, made, packed
from tests.parts.small import D, close, part, put, rows, x

UNITS: dict[str, Any] = {
    "mixer": {
        "kind": "gqa",
        "heads": 4,
        "position": "p",
        "qk_norm": {"norm": {"kind": "ngpt", "size": 4}, "over": "full", "when": "after"},
    },
    "ffn": {"kind": "ngpt", "width": 24},
    "norm": {"place": "none"},
    "residual": {"kind": "ngpt", "start": 0.5},
    "linears": {"*": {"kind": "unit"}},
}
NGPT: dict[str, Any] = {"final_norm": None, "head": {"kind": "ngpt", "tie": True}}
HYPER: dict[str, Any] = {"residual": {"kind": "hyper", "streams": 3}}
VALUES: dict[str, Any] = {
    "mixer": {"kind": "value_residual", "heads": 4, "kv_heads": 2, "position": "p", "learned": True}
}


@torch.no_grad()
def shaken(lm: LM) -> LM:
    """Every parameter moved, so that no gate or mix stands where it begins."""
    for n, p in enumerate(lm.parameters()):
        p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n), dtype=p.dtype))
    return lm


def test_dyt_is_linear_for_small_and_a_sign_for_large_inputs() -> None:
    norm = part("norms", "dyt", alpha=0.7)
    w, b, a = (norm.part.get_parameter(n) for n in ("weight", "bias", "alpha"))
    close(norm.part(x() * 1e-6), w * a * x() * 1e-6 + b, 1e-15)
    close(norm.part(x() * 1e9), w * torch.sign(a * x()) + b)


@torch.no_grad()
def test_the_first_layers_values_reach_the_others() -> None:
    """The second layer's mixer is the reference with the first one's values, which its own input does not tell."""
    lm, caught = shaken(made(VALUES | {"mixer": VALUES["mixer"] | {"position": None}}, positions={})), []
    for block in lm.blocks:
        block.mixer.register_forward_hook(lambda _, args, out: caught.append((args[0], out)))
    lm(rows_step(ids(9)[None]))
    (one, _), (two, said) = caught
    first = one @ lm.blocks[0].mixer.v.weight.T
    mixer = lm.blocks[1].mixer
    weights = {name: p.detach() for name, p in mixer.named_parameters()}
    expected = value_residual.reference(mixer.spec, weights, two, torch.arange(9), first)
    close(said, expected, 1e-10)
    assert not torch.allclose(value_residual.reference(mixer.spec, weights, two, torch.arange(9)), expected, atol=1e-3)


@pytest.mark.parametrize(("block", "more"), [(VALUES, {}), (HYPER, {}), (UNITS, NGPT)], ids=["values", "hyper", "ngpt"])
@torch.no_grad()
def test_a_stack_of_them_is_any_chunking_and_packing(block: dict[str, Any], more: dict[str, Any]) -> None:
    lm, tokens, past, said = shaken(made(block, layers=3, **more)).eval(), ids(12), 0, []
    whole = logits(lm, rows_step(tokens[None], horizon=32))
    cache = Cache(state_table(lm.spec), Size(1, 12, 6), torch.float64)
    slots = [cache.open()]
    for n in (6, 1, 1, 4):
        step = rows_step(tokens[None, past : past + n], past, horizon=32)
        said.append(lm(step, cache.begin(slots, step)).logits)
        past += n
    close(torch.cat(said), whole, 1e-10)
    both = logits(lm, packed(torch.cat([ids(5, 1), tokens]), [[5, 12]]))
    close(both[5:], whole, 1e-10)


def test_values_of_another_shape_are_refused() -> None:
    c = part("mixers", "value_residual", heads=4)
    with pytest.raises(ValueError, match=r"these are \(4, 8\); accepted: \(2, 8\)"):
        c.run(x(), rows(2, 6), given={"first_values": torch.zeros(12, 2, 8, dtype=torch.float64)})
    with pytest.raises(ValueError, match="`takes`"):
        part("mixers", "value_residual", heads=4, takes="other")


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("dynamic", [None, "layernorm"])
@torch.no_grad()
def test_hyper_connections_begin_as_the_plain_residual(streams: int, dynamic: str | None) -> None:
    """The sum of n streams that are each the plain one."""
    wide: dict[str, Any] = {"final_norm": None, "layers": 3}
    plain = made({}, **wide)
    hyper = made({"residual": {"kind": "hyper", "streams": streams, "dynamic": dynamic}}, **wide)
    step = rows_step(ids(7)[None])
    close(logits(hyper, step), streams * logits(plain, step))


@torch.no_grad()
def test_two_stages_of_streams_by_hand() -> None:
    """H'' of two different stages, matrix by matrix as in equation 4."""
    one, two = part("residuals", "hyper", streams=3, dynamic=None), part("residuals", "hyper", streams=3, dynamic=None)
    for c, seed in ((one, 1), (two, 2)):
        put(
            c,
            **{
                n: x(9, seed)[:3, :3] if n == "mix" else x(9, seed)[k, :3]
                for k, n in enumerate(("read", "write", "mix"))
            },
        )
    tokens = x(4)
    stream = two.part.wrap(one.part.wrap(one.part.open(tokens), torch.sin, rows(1, 4)), torch.cos, rows(1, 4))
    for n, token in enumerate(tokens):
        h = token.expand(3, D)
        for c, f in ((one, torch.sin), (two, torch.cos)):
            w = c.weights()
            y = f(w["read"] @ h)
            h = torch.outer(w["write"], y) + (torch.eye(3, dtype=h.dtype) + w["mix"]).T @ h
        close(stream[n], h)
        close(two.part.close(stream)[n], h.sum(0))


@pytest.mark.parametrize("dynamic", [None, "layernorm"])
def test_hyper_connections_cost_what_they_run(dynamic: str | None) -> None:
    c = part("residuals", "hyper", streams=3, dynamic=dynamic)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        c.part.wrap(c.part.open(x()), lambda y: y, rows(2, 6))
    assert counter.get_total_flops() == c.spec.cost(c.site, 12, 0).executed


def test_a_stream_of_another_shape_is_refused() -> None:
    c = part("residuals", "hyper", streams=3)
    with pytest.raises(ValueError, match=r"accepted: \[N, 3, D\]"):
        c.part.wrap(x(), lambda y: y, rows(2, 6))


@torch.no_grad()
def test_ngpt_lives_on_the_sphere() -> None:
    """The stream has length 1 after every block, the logits of a token stay within its gain, and neither the size of
    the embedding nor that of any map matters."""
    lm = shaken(made(UNITS, layers=3, **NGPT))
    assert lm.head is not None
    step = rows_step(ids(9)[None], listen=frozenset(["*.in", "*.out"]))
    out = lm(step)
    for h in out.taps.values():
        close(h.norm(dim=-1), torch.ones(9, dtype=h.dtype), 1e-12)
    bound = (lm.head.gain.abs() * 16**0.5)[None]
    assert out.logits is not None and bool((out.logits.abs() <= bound + 1e-12).all())
    for p in lm.parameters():
        if p.dim() == 2:
            p.mul_(3.7)
    close(logits(lm, step), out.logits, 1e-10)


@torch.no_grad()
def test_scores_of_ngpt_are_scaled_cosines() -> None:
    """Eqs. 15 and 16 of 2410.01131: sqrt(K) times the product of s q / |q| and s k / |k|, s by head and dimension."""
    lm = made(UNITS, **NGPT)
    s = torch.rand(2, 4, 4, dtype=torch.float64) + 0.5
    lm.blocks[0].mixer.q_norm.weight.copy_(s[0].flatten() / 4)
    lm.blocks[0].mixer.k_norm.weight.copy_(s[1].flatten() / 4)
    plain = made({**UNITS, "mixer": {**UNITS["mixer"], "qk_norm": None}}, **NGPT)
    plain.load_state_dict({k: v for k, v in lm.state_dict().items() if "mixer.q_n" not in k and "mixer.k_n" not in k})
    taps = lm(rows_step(ids(6)[None], listen=frozenset(["*.q", "*.k"]))).taps
    q, k = taps["blocks.0.mixer.q"], taps["blocks.0.mixer.k"]
    z = torch.einsum("ihk,jhk->hij", q, k) * q.shape[-1] ** -0.5
    bare = plain(rows_step(ids(6)[None], listen=frozenset(["*.q", "*.k"]))).taps
    unit = [F.normalize(bare[f"blocks.0.mixer.{name}"], dim=-1) * s[i] for i, name in enumerate("qk")]
    close(z, q.shape[-1] ** 0.5 * torch.einsum("ihk,jhk->hij", *unit), 1e-12)


@torch.no_grad()
def test_after_a_step_the_maps_are_of_unit_vectors() -> None:
    lm = shaken(made(UNITS, **NGPT))
    before = logits(lm, rows_step(ids(6)[None]))
    block = lm.blocks[0]
    for layer in lm.blocks:
        for name in ("mixer.q", "mixer.k", "mixer.v", "mixer.out", "ffn.gate", "ffn.up", "ffn.down"):
            layer.get_submodule(name).after({})  # type: ignore[operator]
    assert torch.allclose(block.ffn.up.weight.norm(dim=1), torch.ones(24, dtype=torch.float64))
    assert torch.allclose(block.ffn.down.weight.norm(dim=0), torch.ones(24, dtype=torch.float64))
    assert torch.allclose(block.mixer.out.weight.norm(dim=0), torch.ones(16, dtype=torch.float64))
    close(logits(lm, rows_step(ids(6)[None])), before, 1e-10)


def test_what_unit_maps_cannot_do_is_refused() -> None:
    lm = made(UNITS, d_model=32, **NGPT).float()
    with pytest.raises(ValueError, match=r"weights in 8 or 4 bits are not normalised; accepted dtypes: f32, bf16"):
        logits(quantise(lm, "int8"), rows_step(ids(4)[None]))
    with pytest.raises(ValueError, match="`unit` map onto the stream has no bias"):
        made(UNITS | {"ffn": {"kind": "ngpt", "width": 24, "bias": True}}, **NGPT)


def test_only_the_values_that_are_read_learn() -> None:
    """Of keys^2 values a token touches heads x top: the table's share that the spec declares as active."""
    c = part("ffns", "product_keys", keys=9, heads=2, top=3, key_dim=8)
    taps: dict[str, Tensor] = {}
    c.run(x(1), rows(1, 1, listen=frozenset(["*.read"])), taps=taps).sum().backward()
    touched = set(c.part.values.grad.abs().sum(-1).nonzero()[:, 0].tolist())
    assert touched == set(taps["part.read"].flatten().tolist()) and len(touched) <= 6
    assert c.spec.own(c.site)["values"].active == 6 / 81


@pytest.mark.parametrize(
    ("fields", "said"), [({"key_dim": 7}, "`key_dim` is 7"), ({"top": 6}, r"`top` \(6\) is more than the 5 half keys")]
)
def test_memories_that_cannot_be_are_refused(fields: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        part("ffns", "product_keys", **{"keys": 5, "top": 3, "key_dim": 8, **fields})


def test_they_train() -> None:
    """Every parameter of a stack of all of them gets a gradient, and a few steps lower the loss."""
    memory = {"ffn": {"kind": "product_keys", "keys": 5, "heads": 2, "top": 3, "key_dim": 8}, "norm": {"kind": "dyt"}}
    lm = shaken(made(VALUES | HYPER | memory, final_norm="dyt"))
    tokens = ids(24).view(2, 12)
    tuned, losses = torch.optim.Adam(lm.parameters(), 1e-2), []
    for _ in range(6):
        found = lm(rows_step(tokens), targets=tokens.flatten().roll(-1)).loss
        assert found is not None
        tuned.zero_grad()
        (found["nll"] / tokens.numel()).backward()
        assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in lm.parameters())
        tuned.step()
        losses.append(float(found["nll"].detach()))
    assert losses[-1] < 0.95 * losses[0] and VOCAB == 17

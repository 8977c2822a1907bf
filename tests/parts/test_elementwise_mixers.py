"""Mixers with elementwise recurrences: closed forms, and how their weights begin."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

from assay.conform.cases import Case
from assay.model.init import draw
from assay.spec import registry
from assay.spec.base import Site, Weight
from tests.parts.small import D, close, part, put, rows, x

STEP = rows(2, 6)
HEARS = frozenset(["*"])


def begins(slot: str, kind: str, layer: int = 0, layers: int = 1, d: int = D, **fields: object) -> dict[str, Tensor]:
    """The weights of a part as a new model has them."""
    spec = registry.get(slot, kind).model_validate({"kind": kind, **fields})
    table: dict[str, Weight] = spec.weights(Site("part", layer, layers, d, d))
    return {name: draw(w.init, w.shape, 0, name) for name, w in table.items()}


def mix(c: Case, tokens: Tensor, name: str = "mix") -> Tensor:
    taps: dict[str, Tensor] = {}
    c.run(tokens, STEP.with_(listen=HEARS), taps=taps)
    return taps[f"part.{name}"]


@pytest.mark.parametrize("numbers", ["complex", "real"])
def test_s4d_is_its_convolution(numbers: str) -> None:
    """2206.11893, eqs. 4-5: K = 2 Re(C (e^(dt A) - 1) / A V(A)) and y = K * x + D x, by FFT."""
    c = part("mixers", "s4d", modes=3, numbers=numbers, chunk=4)
    w = c.weights()
    a = -torch.exp(w["log_rate"])
    out = w["c"]
    if numbers == "complex":
        a, out = torch.complex(a, w["turn"]), 2 * torch.view_as_complex(w["c"])
    power = w["log_dt"].exp()[:, None] * a
    vandermonde = torch.exp(power[..., None] * torch.arange(6))
    kernel = ((out * (power.exp() - 1) / a)[..., None] * vandermonde).sum(1).real
    tokens = x().view(2, 6, D).transpose(1, 2)
    y = torch.fft.irfft(torch.fft.rfft(tokens, 12) * torch.fft.rfft(kernel, 12), 12)[..., :6]
    close(mix(c, x()), (y + w["d"][:, None] * tokens).transpose(1, 2).flatten(0, 1), 1e-12)


def test_chunks_of_s4d_change_nothing() -> None:
    found = [part("mixers", "s4d", modes=3, chunk=size).run(x(), STEP) for size in (2, 5, 16)]
    close(found[0], found[2])
    close(found[1], found[2])


def test_mamba_at_the_end_of_its_step() -> None:
    """At dt = 0 nothing enters and what is left is D x; as dt grows every state forgets: y = C B dt x + D x."""
    c = part("mixers", "mamba", width=8, state_dim=3, conv=2)
    w = c.weights()
    put(c, dt_weight=torch.zeros_like(w["dt_weight"]), dt_bias=torch.full((8,), -60.0))
    raw = (x() @ w["x.weight"].T).view(2, 6, 8)
    before = F.pad(raw, (0, 0, 1, 0))[:, :-1]
    u = F.silu(raw * w["conv"][:, 1] + before * w["conv"][:, 0] + w["conv_bias"]).flatten(0, 1)
    gate = F.silu(x() @ w["z.weight"].T)
    close(mix(c, x()), u * w["d"] * gate, 1e-12)
    put(c, dt_bias=torch.full((8,), 300.0))
    _, b, into = (u @ w["select.weight"].T).split([2, 3, 3], -1)
    close(mix(c, x()), ((b * into).sum(-1, keepdim=True) * 300.0 * u + w["d"] * u) * gate, 1e-10)


def test_an_open_mingru_is_its_candidate_and_a_closed_one_remembers_nothing_new() -> None:
    c = part("mixers", "mingru", positive=False)
    w = c.weights()
    put(c, gate__weight=torch.zeros(D, D), gate__bias=torch.full((D,), 60.0))
    close(mix(c, x()), x() @ w["candidate.weight"].T + w["candidate.bias"], 1e-12)
    put(c, gate__bias=torch.full((D,), -800.0))
    assert float(mix(c, x()).abs().max()) == 0.0


def test_the_states_of_a_positive_mingru_are_averages() -> None:
    """Convex combinations of positive candidates and of 0: between 0 and the largest so far."""
    c = part("mixers", "mingru")
    w = c.weights()
    z = x() @ w["candidate.weight"].T + w["candidate.bias"]
    largest = torch.where(z >= 0, z + 0.5, torch.sigmoid(z)).view(2, 6, D).cummax(1).values.flatten(0, 1)
    h = mix(c, x())
    assert bool((h > 0).all()) and bool((h <= largest + 1e-12).all())


def test_the_first_token_of_a_gated_recurrence_enters_whole() -> None:
    """With gates open and a decay of nearly 1 the root is nearly 0, yet h_1 = u_1, and it stays."""
    c = part("mixers", "rglru", heads=4, conv=2, act="relu")
    shapes = {name: w.shape for name, w in c.weights().items()}
    put(c, rate=torch.full((D,), -40.0), input_bias=torch.full(shapes["input_bias"], 60.0))
    put(c, input=torch.zeros(shapes["input"]), y__weight=torch.zeros(D, D), y__bias=torch.ones(D))
    w = c.weights()
    raw = (x() @ w["x.weight"].T + w["x.bias"]).view(2, 6, D)
    first = raw[:, :1] * w["conv"][:, 1] + w["conv_bias"]
    close(mix(c, x()), first.expand(2, 6, D).flatten(0, 1), 1e-6)


def test_the_root_of_a_decay_of_one_has_a_gradient() -> None:
    """A decay that rounds to 1 leaves 0 under the root, whose derivative is infinite; it is bounded, not NaN."""
    c = part("mixers", "rglru", heads=4)
    put(c, rate=torch.full((D,), -800.0))
    tokens = x().requires_grad_()
    c.run(tokens, STEP).sum().backward()
    assert tokens.grad is not None and bool(torch.isfinite(tokens.grad).all())


def test_token_shift_of_the_channel_mix() -> None:
    """mu = 1 sees the token alone; mu = 0 only the one before, and nothing for the first."""
    c = part("ffns", "rwkv_channel", width=12)
    w = c.weights()

    def net(r: Tensor, k: Tensor) -> Tensor:
        return torch.sigmoid(r @ w["r.weight"].T) * (F.relu(k @ w["k.weight"].T).square() @ w["v.weight"].T)

    put(c, mu_r=torch.ones(D), mu_k=torch.ones(D))
    close(c.run(x(), STEP), net(x(), x()))
    put(c, mu_k=torch.zeros(D))
    before = F.pad(x().view(2, 6, D), (0, 0, 1, 0))[:, :-1].flatten(0, 1)
    close(c.run(x(), STEP), net(x(), before))


def test_how_a_selective_model_begins() -> None:
    """A_n = -n (S4D-Real), steps even in the logarithm between the two of `dt_range` (2312.00752, section 3.6)."""
    w = begins("mixers", "mamba", d=512, dt_range=(1e-3, 1e-1))
    close(w["a_log"].exp(), torch.arange(1.0, 17.0).expand(1024, 16), 1e-6)
    dt = F.softplus(w["dt_bias"])
    assert float(dt.min()) > 0.99e-3 and float(dt.max()) < 1.01e-1
    spread = math.log(100.0)
    assert abs(float(dt.log().mean()) - math.log(1e-2)) < 4 * spread / (12 * 1024) ** 0.5
    assert abs(float(dt.log().std()) - spread / 12**0.5) < 0.05 * spread
    assert float(w["dt_weight"].abs().max()) <= 32**-0.5 and bool((w["d"] == 1).all())


def test_how_gated_recurrences_and_modes_begin() -> None:
    """Decays exp(-softplus(rate)) even in (0.9, 0.999) (2402.19427, section 2.4); S4D-Lin and S4D-Real."""
    decay = torch.exp(-F.softplus(begins("mixers", "rglru", heads=4, width=4096)["rate"]))
    assert float(decay.min()) >= 0.9 and float(decay.max()) <= 0.999 + 1e-6
    assert abs(float(decay.mean()) - 0.9495) < 4 * 0.099 / (12 * 4096) ** 0.5
    w = begins("mixers", "s4d", modes=5)
    close(w["turn"], math.pi * torch.arange(5.0).expand(D, 5), 1e-6)
    close(w["log_rate"].exp(), torch.full((D, 5), 0.5), 1e-6)
    close(begins("mixers", "s4d", modes=5, numbers="real")["log_rate"].exp(), torch.arange(1.0, 6).expand(D, 5), 1e-6)


def test_rwkv_begins_as_transformers_begins_it() -> None:
    """But for time_first, where transformers has ones in place of log 0.3 and a zigzag around it."""
    config = hf.RwkvConfig(vocab_size=11, hidden_size=16, num_hidden_layers=3, intermediate_size=20)
    for layer, block in enumerate(hf.RwkvModel(config).blocks):
        time, channel = block.attention, block.feed_forward
        w = begins("mixers", "rwkv4", layer, 3, 16) | {
            f"ffn.{n}": t for n, t in begins("ffns", "rwkv_channel", layer, 3, 16, width=20).items()
        }
        theirs = {"decay": time.time_decay, "mu_k": time.time_mix_key, "mu_v": time.time_mix_value}
        theirs |= {"mu_r": time.time_mix_receptance, "ffn.mu_k": channel.time_mix_key}
        theirs |= {"ffn.mu_r": channel.time_mix_receptance}
        for name, value in theirs.items():
            close(w[name], value.flatten(), 1e-5)
        zigzag = torch.tensor([(i + 1) % 3 - 1 for i in range(16)]) * 0.5
        close(w["first"], math.log(0.3) + zigzag, 1e-6)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mamba", {"dt_range": (0.1, 0.01)}, "dt_range: expected two steps, 0 < first < second"),
        ("s4d", {"dt_range": (0.0, 0.01)}, "dt_range: expected two steps, 0 < first < second"),
        ("rglru", {"heads": 5}, r"`width` \(32\) is not a multiple of `heads` \(5\)"),
        ("mamba", {"norm": "batchnorm"}, "`norm` 'batchnorm' mixes tokens; accepted: rmsnorm, layernorm"),
    ],
)
def test_what_cannot_be_built_is_refused(kind: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("dt_range: ", "")):
        part("mixers", kind, **fields)

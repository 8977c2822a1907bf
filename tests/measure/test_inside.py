"""Attention, the logit lens, wavelengths and curves against explicit formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from assay.data.loader import windows
from assay.measure import attention, lens, steps_to_loss, wavelengths
from assay.measure.subject import Subject
from assay.ops.step import rows_step
from tests.measure.subjects import spec, subject


@torch.no_grad()
def weights_of(made: Subject, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """[H, T, T]: the logits of one row in one layer, position by position from the weights."""
    mixer: Any = made.model.blocks[layer].mixer
    captured = {}
    hook = mixer.register_forward_pre_hook(lambda _, args: captured.update(x=args[0]))
    made.model(rows_step(ids[None]))
    hook.remove()
    x, heads, rule = captured["x"], mixer.spec.heads, mixer.spec.scores
    k = mixer.spec.size(mixer.site)
    q = (x @ mixer.q.weight.T).view(len(ids), heads, k)
    keys = (x @ mixer.k.weight.T).view(len(ids), mixer.spec.groups, k)

    def turned(v: torch.Tensor, position: int) -> torch.Tensor:
        out = v.clone()
        for i in range(k // 2):
            angle = position * 10_000.0 ** (-2 * i / k)
            c, s = math.cos(angle), math.sin(angle)
            out[i], out[i + k // 2] = v[i] * c - v[i + k // 2] * s, v[i + k // 2] * c + v[i] * s
        return out

    z = torch.full((heads, len(ids), len(ids)), float("-inf"), dtype=x.dtype)
    for h in range(heads):
        g = h // (heads // mixer.spec.groups)
        for i in range(len(ids)):
            for j in range(max(0, i - (mixer.spec.sees.window or 10**6) + 1), i + 1):
                raw = turned(q[i, h], i) @ turned(keys[j, g], j) / k**0.5
                z[h, i, j] = raw if rule.softcap is None else rule.softcap * torch.tanh(raw / rule.softcap)
    return z


@pytest.mark.parametrize(
    "mixer",
    [{}, {"kv_heads": 1, "sees": {"window": 5}}, {"scores": {"softcap": 2.0}}, {"scores": {"sink": True}}],
)
def test_attention_is_the_explicit_softmax(mixer: dict[str, Any]) -> None:
    made = subject(spec(**mixer))
    for name, parameter in made.model.named_parameters():
        if name.endswith("sink"):
            torch.nn.init.constant_(parameter, 0.5)
    rows = attention.measure(made, tokens=32)
    text = windows(made.text, 16, 2, join=True).inputs.view(2, 16)
    for layer, row in enumerate(rows):
        z = torch.stack([weights_of(made, layer, ids) for ids in text])
        if "scores" in mixer and "sink" in mixer["scores"]:
            p = torch.softmax(torch.cat([z, torch.full((2, 2, 16, 1), 0.5)], -1), -1)[..., :-1]
        else:
            p = torch.softmax(z, -1)
        entropy = -(p * p.clamp(min=1e-300).log()).sum(-1).mean()
        assert (row["layer"], row["tokens"]) == (layer, 32)
        assert row["sink_mass"] == pytest.approx(float(p[:, :, 1:, 0].mean()), abs=1e-9)
        assert row["entropy_nats"] == pytest.approx(float(entropy), abs=1e-9)
        assert row["max_logit"] == pytest.approx(float(z.max()), abs=1e-9)


def test_keys_that_are_stored_raw_are_turned_first() -> None:
    written = attention.measure(subject(spec({"kind": "rope"})), tokens=32)
    read = attention.measure(subject(spec({"kind": "rope", "turns": "read"})), tokens=32)
    for a, b in zip(written, read, strict=True):
        assert a == pytest.approx(b, abs=1e-10)


def test_shared_keys_are_the_givers() -> None:
    """Two layers of attention, the second without keys of its own."""
    tree = spec(layers=2).model_dump(mode="json")
    first = dict(tree["blocks"]["b"])
    tree["blocks"] = {
        "a": {**first, "mixer": {**first["mixer"], "gives": "kv"}},
        "b": {**first, "mixer": {**first["mixer"], "takes": "kv"}},
    }
    tree["pattern"] = ["a", "b"]
    made = subject(type(spec()).model_validate(tree))
    assert [row["layer"] for row in attention.measure(made, tokens=32)] == [0, 1]


def test_a_model_without_attention_has_no_rows() -> None:
    tree = spec().model_dump(mode="json")
    tree["blocks"]["b"]["mixer"] = {"kind": "linear", "heads": 2}
    assert attention.measure(subject(type(spec()).model_validate(tree)), tokens=32) == []


def test_the_last_layer_of_the_lens_is_the_models_loss() -> None:
    made = subject()
    rows = lens.measure(made, tokens=64)
    text = windows(made.text, 16, 4, join=True)
    ids, targets = text.inputs.view(4, 16), text.targets
    logits = made.model(rows_step(ids)).logits.detach()
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert rows[-1]["loss_nats"] == pytest.approx(float(F.cross_entropy(logits, targets)), abs=1e-10)
    table, norm = made.model.embed.weight.detach(), made.model.final_norm
    embedded = F.cross_entropy(norm(table[ids.view(-1)]) @ table.T, targets)
    assert rows[0]["loss_nats"] == pytest.approx(float(embedded.detach()), abs=1e-10)
    assert abs(rows[1]["loss_nats"] - rows[2]["loss_nats"]) > 1e-3


def test_wavelengths_are_two_pi_theta_to_the_pair() -> None:
    rows = wavelengths.measure(subject(spec({"kind": "rope", "theta": 100.0})))
    for i, row in enumerate(rows):
        tokens = 2 * math.pi * 100.0 ** (2 * i / 8)
        assert (row["scheme"], row["dim"], row["completes"]) == ("main", i, tokens <= 16)
        assert row["wavelength"] == pytest.approx(tokens)
    assert len(rows) == 4 and [row["completes"] for row in rows].count(True) == 1
    assert wavelengths.measure(subject(spec({"kind": "learned"}))) == []


def test_steps_to_a_loss_read_off_a_curve() -> None:
    """Halving at every step: the mean of two neighbours 8, 4, 2, 1 is 6, 3, 1.5."""
    curve = tuple((32 * (i + 1), 8.0 / 2**i) for i in range(4))
    made = replace(subject(), outcome=SimpleNamespace(losses=curve))  # type: ignore[arg-type]
    rows = steps_to_loss.measure(made, losses=(6.0, 2.9, 1.0), over=2)
    assert [(row["steps"], row["tokens"]) for row in rows] == [(2, 64), (4, 128), (None, None)]
    with pytest.raises(ValueError, match="not trained"):
        steps_to_loss.measure(subject())

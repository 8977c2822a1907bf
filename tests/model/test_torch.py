"""Post-norm and pre-norm layers, and an encoder-decoder, beside torch's own modules; float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.model.lm import LM, weight_table
from assay.ops.step import rows_step
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from tests.model.hf import randomised
from tests.model.small import VOCAB, ids

NORM = {"kind": "layernorm", "eps": 1e-5}
FFN = {"kind": "dense", "width": 40, "act": "relu", "bias": True}
SELF = {"kind": "gqa", "heads": 4, "bias": "all"}
BASE = {"d_model": 16, "vocab": VOCAB, "layers": 2, "context": 32}


def model(**changes: Any) -> LM:
    return LM(validate(ModelSpec, {**BASE, **changes}, "here")).double()


@torch.no_grad()
def copied(lm: LM, prefix: str, source: nn.Module, names: dict[str, str]) -> set[str]:
    """Copies `source` under `prefix`, its packed projections cut in three; returns the names that were filled."""
    own, filled = dict(lm.named_parameters()), set()
    for name, t in source.state_dict().items():
        place, kind = name.rsplit(".", 1)
        packed = kind.startswith("in_proj_")
        parts = zip("qkv", t.chunk(3), strict=True) if packed else [("out" if place.endswith("out_proj") else "", t)]
        for part, value in parts:
            inner = names[place.removesuffix(".out_proj")]
            path = ".".join(p for p in (prefix, inner, part, kind.removeprefix("in_proj_")) if p)
            assert own[path].shape == value.shape
            own[path].copy_(value)
            filled.add(path)
    return filled


def close(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a, b.flatten(0, 1), rtol=0, atol=1e-10 * float(b.detach().abs().max()))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_encoder_layers(first: bool, causal: bool) -> None:
    layers = [nn.TransformerEncoderLayer(16, 4, 40, 0.0, batch_first=True, norm_first=first) for _ in range(2)]
    block = {"mixer": {**SELF, "sees": {"causal": causal}}, "ffn": FFN}
    lm = model(
        blocks={"b": {**block, "norm": {"place": "pre" if first else "post", "kind": NORM}}}, final_norm=None, head=None
    )
    norms = ("mixer_norm", "ffn_norm") if first else ("residual0.norm", "residual1.norm")
    names = {"self_attn": "mixer", "linear1": "ffn.up", "linear2": "ffn.down", "norm1": norms[0], "norm2": norms[1]}
    filled = {"embed.weight"}
    for i, layer in enumerate(layers):
        filled |= copied(lm, f"blocks.{i}", randomised(layer, i).double(), names)
    assert filled == {n for n, _ in lm.named_parameters()}
    randomised(lm.embed)
    x = ids(14).view(2, 7)
    h = lm.embed.weight[x]
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64) if causal else None
    for layer in layers:
        h = layer.train()(h, src_mask=mask)  # in evaluation torch takes a fused path of its own
    close(lm(rows_step(x)).logits, h)


def encoder_decoder(theirs: nn.Transformer, encoder: dict[str, Any], **changes: Any) -> tuple[LM, set[str]]:
    """Post-norm, cross-attention between self-attention and the feed-forward network, with the layers of `theirs`;
    and the names of the parameters that these filled."""
    post = {"kind": "post", "norm": NORM}
    parts = [{"mixer": SELF}, {"mixer": {"kind": "cross", "heads": 4, "bias": True}}, {"ffn": FFN}]
    stages = [{"branches": [part], "residual": post} for part in parts]
    encoder = {**BASE, "final_norm": NORM, "head": None, **encoder}
    encoder["blocks"] = {
        "e": {"mixer": {**SELF, "sees": {"causal": False}}, "ffn": FFN, "norm": {"place": "post", "kind": NORM}}
    }
    lm = model(blocks={"d": {"stages": stages}}, final_norm=NORM, encoder=encoder, **changes)
    names = {"self_attn": "mixer", "linear1": "ffn.up", "linear2": "ffn.down", "multihead_attn": "mixer2"}
    norms = {f"norm{i + 1}": f"residual{i}.norm" for i in range(3)}
    filled: set[str] = set()
    for i in range(2):
        filled |= copied(lm, f"encoder.blocks.{i}", theirs.encoder.layers[i], {**names, **norms})
        filled |= copied(lm, f"blocks.{i}", theirs.decoder.layers[i], {**names, **norms})
    for prefix, norm in (("encoder", theirs.encoder.norm), ("", theirs.decoder.norm)):
        filled |= copied(lm, prefix, nn.ModuleDict({"n": norm}), {"n": "final_norm"})
    return lm, filled


def transformer() -> nn.Transformer:
    theirs = nn.Transformer(16, 4, 2, 2, 40, 0.0, batch_first=True)
    return randomised(theirs).double().train()  # type: ignore[return-value]


MASK = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)


def test_encoder_decoder() -> None:
    theirs = transformer()
    lm, filled = encoder_decoder(theirs, {"vocab": 9}, head=None)
    assert filled | {"embed.weight", "encoder.embed.weight"} == {n for n, _ in lm.named_parameters()}
    assert lm.encoder is not None
    for table in (lm.embed, lm.encoder.embed):
        randomised(table)
    source, x = ids(10, 1).view(2, 5) % 9, ids(14).view(2, 7)
    expected = theirs(lm.encoder.embed.weight[source], lm.embed.weight[x], tgt_mask=MASK)
    step = rows_step(x, encode=rows_step(source))
    close(lm(step).logits, expected)
    names_heard = lm(step.with_(encode=step.encode.with_(listen=frozenset(["*.in"])))).taps  # type: ignore[union-attr]
    assert names_heard.keys() == {"encoder.blocks.0.in", "encoder.blocks.1.in"}


def sines(x: Tensor) -> Tensor:
    """Vaswani et al. 2017, section 3.5, a number at a time."""
    rows = [[math.sin(p / 1e4 ** (i / 16)) if i % 2 == 0 else math.cos(p / 1e4 ** ((i - 1) / 16)) for i in range(16)]
            for p in range(x.shape[1])]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def test_the_transformer_of_2017() -> None:
    """Section 3.4: one table for source, target and logits, times sqrt(d_model) where it embeds; sines and cosines."""
    theirs, positions = transformer(), {"p": "sinusoidal"}
    embed = {"kind": "token", "scale": 4.0}
    encoder = {"positions": positions, "embed": {**embed, "shared": True}}
    head = {"kind": "lm", "tie": True}
    lm, filled = encoder_decoder(theirs, encoder, positions=positions, embed=embed, head=head)
    assert filled | {"embed.weight"} == {n for n, _ in lm.named_parameters()}
    table = randomised(lm.embed).weight
    source, x = ids(10, 1).view(2, 5), ids(14).view(2, 7)
    embedded = [4.0 * table[t] + sines(t) for t in (source, x)]
    expected = theirs(*embedded, tgt_mask=MASK) @ table.T  # type: ignore[operator]
    made = lm(rows_step(x, encode=rows_step(source))).logits
    close(made, expected)
    probe = torch.randn(made.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad((y.flatten() * probe.flatten()).sum(), table)[0] for y in (made, expected)]
    assert torch.allclose(*grads, rtol=1e-9)
    tables = weight_table(lm.spec)
    assert tables.keys() == {n for n, _ in lm.named_parameters()}


def test_a_shared_table_is_the_models_own() -> None:
    with pytest.raises(ValueError, match=r"encoder\.embed.*would be 9 x 16, the model's is 17 x 16"):
        encoder_decoder(transformer(), {"vocab": 9, "embed": {"kind": "token", "shared": True}}, head=None)
    alone = model(blocks={"b": {"mixer": SELF}}, embed={"kind": "token", "shared": True}, final_norm=None, head=None)
    with pytest.raises(ValueError, match="embed: `shared` reads the table of the model around it"):
        alone(rows_step(ids(4)[None]))

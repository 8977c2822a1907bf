"""The LM, told the spec of a family that nothing imports and given its weights by hand, computes what Hugging Face's
own class computes. Families that are imported are compared in tests/hub, at the same places and more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from assay.model.lm import LM
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from tests.model.hf import VOCAB, assert_equal, differences, randomised

SIZES = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
NAMES = {
    "model.embed_tokens": "embed",
    "model.norm": "final_norm",
    "model.layers": "blocks",
    "input_layernorm": "norm0",
    "self_attn": "mixer",
    "mlp": "ffn",
    **{f"{name}_proj": name for name in ("q", "k", "v", "gate", "up", "down")},
    "o_proj": "out",
}


@pytest.fixture
def cohere() -> tuple[LM, Any]:
    """Attention and feed-forward beside each other under one norm, logits scaled, no local layer. Cohere turns
    neighbouring pairs, so the rows of its query and key maps are put in half-split order."""
    config = transformers.CohereConfig(
        **SIZES, **HEADS, attn_implementation="eager", logit_scale=0.25, rope_theta=500.0
    )
    theirs: Any = randomised(transformers.CohereForCausalLM(config))
    norm = {"kind": "layernorm", "bias": False, "eps": config.layer_norm_eps}
    block = {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "p"},
        "ffn": {"kind": "gated", "width": 40},
        "norm": {"kind": norm},
        "parallel": "shared",
    }
    tree = {"d_model": 24, "vocab": VOCAB, "layers": 2, "context": 64, "final_norm": norm, "blocks": {"b": block}}
    tree |= {"positions": {"p": {"kind": "rope", "theta": 500.0}}, "head": {"kind": "lm", "tie": True, "scale": 0.25}}
    lm = LM(validate(ModelSpec, tree, "here"))
    weights = {}
    for name, w in theirs.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if name.endswith((".q.weight", ".k.weight")):
            w = w.unflatten(0, (-1, 3, 2)).transpose(1, 2).reshape(-1, 24)  # heads, pairs, (even, odd)
        weights[name] = w
    weights.pop("lm_head.weight")
    lm.load_state_dict(weights, strict=True)
    return lm.eval(), theirs


def test_equals_hugging_face(cohere: tuple[LM, Any]) -> None:
    assert_equal(*cohere)


def test_a_difference_is_seen(cohere: tuple[LM, Any]) -> None:
    """The comparison itself: one weight of one layer moved by a percent shows from that layer on."""
    lm, theirs = cohere
    with torch.no_grad():
        lm.get_parameter("blocks.1.mixer.v.weight").mul_(1.01)
    told = differences(lm, theirs)
    assert told["hidden 1"] <= 1e-5 and told["hidden 2"] > 1e-4 and told["logits"] > 1e-5

"""The one LM, told a family's spec and given its weights, computes what Hugging Face's own class computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from assay.model.lm import LM
from tests.model.hf import VOCAB, assert_equal, differences, llama_names, model, randomised, renamed

PRE = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm"}
OUTPUT = {"post_attention_layernorm": "mixer_post", "post_feedforward_layernorm": "ffn_post"}
SANDWICH = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "mixer_post",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_post",
}
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
QUIET: dict[str, Any] = {"attn_implementation": "eager"}
BASE = {"d_model": 24, "vocab": VOCAB, "layers": 2, "context": 64}


def rms(eps: float = 1e-6, weight: str = "one") -> dict[str, Any]:
    return {"kind": "rmsnorm", "eps": eps, "weight": weight}


def gpt2() -> tuple[LM, Any]:
    """Learned positions, LayerNorm and every bias, GELU's tanh form, a tied head; Conv1D stores [in, out]."""
    sizes = {"vocab_size": VOCAB, "n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 64}
    theirs = randomised(hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **QUIET)))
    weights = {}
    places = {"ln_1": "mixer_norm", "ln_2": "ffn_norm", "attn.c_proj": "mixer.out", "mlp.c_fc": "ffn.up"}
    places |= {"mlp.c_proj": "ffn.down", "wte": "embed", "wpe": "positions.p", "ln_f": "final_norm"}
    for name, t in theirs.transformer.state_dict().items():
        place, kind = name.rsplit(".", 1)
        block, place = ".".join(["blocks", *place.split(".")[1:2], ""]) if place[0] == "h" else "", place
        inner = place.split(".", 2)[2] if block else place
        t = t.T if t.dim() == 2 and block else t
        if inner == "attn.c_attn":
            weights |= {f"{block}mixer.{n}.{kind}": p for n, p in zip("qkv", t.chunk(3), strict=True)}
        else:
            weights[f"{block}{places[inner]}.{kind}"] = t
    norm = {"kind": "layernorm", "eps": 1e-5}
    block = {
        "mixer": {"kind": "gqa", "heads": 4, "bias": "all", "position": "p"},
        "ffn": {"kind": "dense", "width": 96, "act": "gelu_tanh", "bias": True},
        "norm": {"kind": norm},
    }
    tree = {**BASE, "positions": {"p": "learned"}, "blocks": {"b": block}, "final_norm": norm}
    return model({**tree, "head": {"kind": "lm", "tie": True}}, weights), theirs


def llama() -> tuple[LM, Any]:
    """RoPE in half-split pairs, grouped heads, RMSNorm, SwiGLU, an untied head."""
    config = hf.LlamaConfig(**SIZES, **HEADS, **QUIET, rms_norm_eps=1e-5, rope_theta=500.0)
    theirs = randomised(hf.LlamaForCausalLM(config))
    block = {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "p"},
        "ffn": {"kind": "gated", "width": 40},
        "norm": {"kind": rms(1e-5)},
    }
    tree = {**BASE, "positions": {"p": {"kind": "rope", "theta": 500.0}}, "blocks": {"b": block}}
    weights = renamed(theirs.state_dict(), lambda n: llama_names(n, PRE, tied=False))
    return model({**tree, "final_norm": rms(1e-5)}, weights), theirs


def gemma2() -> tuple[LM, Any]:
    """Sandwich norms with 1 + w, soft caps on scores and logits, windows on every other layer, a scaled embedding."""
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 10, "head_dim": 8}
    config = hf.Gemma2Config(**{**SIZES, "num_hidden_layers": 4}, **HEADS, **QUIET, **caps, sliding_window=5)
    theirs = randomised(hf.Gemma2ForCausalLM(config))
    mixer = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "position": "p"}
    mixer |= {"scores": {"scale": 10**-0.5, "softcap": 3.0}}
    rest = {"ffn": {"kind": "gated", "width": 40, "act": "gelu_tanh"}}
    rest |= {"norm": {"place": "sandwich", "kind": rms(weight="plus_one")}}
    blocks = {"local": {"mixer": {**mixer, "sees": {"window": 5}}, **rest}, "global": {"mixer": mixer, **rest}}
    tree = {**BASE, "layers": 4, "blocks": blocks, "pattern": ["local", "global"], "positions": {"p": "rope"}}
    tree |= {"embed": {"kind": "token", "scale": 24**0.5}, "final_norm": rms(weight="plus_one")}
    tree |= {"head": {"kind": "lm", "tie": True, "softcap": 4.0}}
    return model(tree, renamed(theirs.state_dict(), lambda n: llama_names(n, SANDWICH))), theirs


def gemma3() -> tuple[LM, Any]:
    """Five local layers to a global one, a RoPE base for each, norms with 1 + w on queries and keys."""
    sizes = {**SIZES, "num_hidden_layers": 6}
    config = hf.Gemma3TextConfig(**sizes, **HEADS, **QUIET, head_dim=8, query_pre_attn_scalar=10, sliding_window=5)
    theirs = randomised(hf.Gemma3ForCausalLM(config))
    norm = rms(weight="plus_one")
    mixer = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "qk_norm": {"norm": norm}}
    mixer |= {"scores": {"scale": 10**-0.5}}
    rest = {"ffn": {"kind": "gated", "width": 40, "act": "gelu_tanh"}, "norm": {"place": "sandwich", "kind": norm}}
    local = {"mixer": {**mixer, "sees": {"window": 5}, "position": "local"}, **rest}
    blocks = {"local": local, "global": {"mixer": {**mixer, "position": "global"}, **rest}}
    tree = {**BASE, "layers": 6, "blocks": blocks, "pattern": ["local"] * 5 + ["global"], "final_norm": norm}
    tree |= {"positions": {"local": {"kind": "rope", "theta": 1e4}, "global": {"kind": "rope", "theta": 1e6}}}
    tree |= {"embed": {"kind": "token", "scale": 24**0.5}, "head": {"kind": "lm", "tie": True}}
    return model(tree, renamed(theirs.state_dict(), lambda n: llama_names(n, SANDWICH))), theirs


def olmo2() -> tuple[LM, Any]:
    """Norms on the branches' outputs, and on all heads of the queries and keys together."""
    config = hf.Olmo2Config(**SIZES, **HEADS, **QUIET, rms_norm_eps=1e-5)
    theirs = randomised(hf.Olmo2ForCausalLM(config))
    block = {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "p"},
        "ffn": {"kind": "gated", "width": 40},
        "norm": {"place": "output", "kind": rms(1e-5)},
    }
    block["mixer"]["qk_norm"] = {"norm": rms(1e-5), "over": "full"}  # type: ignore[index]
    tree = {**BASE, "positions": {"p": "rope"}, "blocks": {"b": block}, "final_norm": rms(1e-5)}
    return model(tree, renamed(theirs.state_dict(), lambda n: llama_names(n, OUTPUT, tied=False))), theirs


def cohere() -> tuple[LM, Any]:
    """Attention and feed-forward beside each other under one norm, logits scaled. Cohere turns neighbouring pairs, so
    the rows of its query and key maps are put in half-split order."""
    config = hf.CohereConfig(**SIZES, **HEADS, **QUIET, logit_scale=0.25, rope_theta=500.0)
    theirs = randomised(hf.CohereForCausalLM(config))
    weights = renamed(theirs.state_dict(), lambda n: llama_names(n, {"input_layernorm": "norm0"}))
    for name in [n for n in weights if n.endswith((".q.weight", ".k.weight"))]:
        w = weights[name].unflatten(0, (-1, 3, 2))  # heads, pairs, (even, odd)
        weights[name] = w.transpose(1, 2).reshape(-1, 24)
    norm = {"kind": "layernorm", "bias": False, "eps": config.layer_norm_eps}
    block = {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "p"},
        "ffn": {"kind": "gated", "width": 40},
        "norm": {"kind": norm},
        "parallel": "shared",
    }
    tree = {**BASE, "positions": {"p": {"kind": "rope", "theta": 500.0}}, "blocks": {"b": block}, "final_norm": norm}
    return model({**tree, "head": {"kind": "lm", "tie": True, "scale": 0.25}}, weights), theirs


def mixtral() -> tuple[LM, Any]:
    """Four experts, two a token, shares that sum to one."""
    config = hf.MixtralConfig(**SIZES, **HEADS, **QUIET, num_local_experts=4, num_experts_per_tok=2, rope_theta=1e4)
    theirs = randomised(hf.MixtralForCausalLM(config))
    weights = {}
    for name, t in theirs.state_dict().items():
        new = llama_names(name, {**PRE, "block_sparse_moe": "ffn"}, tied=False)
        assert new is not None
        if new.endswith("experts.gate_up_proj"):
            gate, up = t.chunk(2, 1)
            weights |= {new.replace("experts.gate_up_proj", n): v for n, v in (("gate", gate), ("up", up))}
        else:
            new = new.replace("experts.down", "down").replace("ffn.gate.weight", "ffn.router.map.weight")
            weights[new] = t
    block = {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "p"},
        "ffn": {"kind": "moe", "experts": 4, "width": 40},
        "norm": {"kind": rms(1e-5)},
    }
    tree = {**BASE, "positions": {"p": "rope"}, "blocks": {"b": block}, "final_norm": rms(1e-5)}
    return model(tree, weights), theirs


FAMILIES = (gpt2, llama, gemma2, gemma3, olmo2, cohere, mixtral)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hugging_face(family: Any) -> None:
    lm, theirs = family()
    assert_equal(lm, theirs)


def test_a_difference_is_seen() -> None:
    """The comparison itself: one weight of one layer moved by a percent shows from that layer on."""
    lm, theirs = llama()
    with torch.no_grad():
        lm.get_parameter("blocks.1.mixer.v.weight").mul_(1.01)
    told = differences(lm, theirs)
    assert told["hidden 1"] <= 1e-5 and told["hidden 2"] > 1e-4 and told["logits"] > 1e-4

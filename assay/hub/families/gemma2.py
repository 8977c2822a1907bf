"""Gemma 2: norms before and after each branch, capped logits, local and global layers in turn. arXiv 2408.00118."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.spec.model import ModelSpec

TYPES = ("gemma2",)
NAMES = shared.over(
    {
        "blocks.*.mixer_post.*": "model.layers.*.post_attention_layernorm.*",
        "blocks.*.ffn_norm.*": "model.layers.*.pre_feedforward_layernorm.*",
        "blocks.*.ffn_post.*": "model.layers.*.post_feedforward_layernorm.*",
    }
)
SKIP, SAME = shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    layers = c.integer("num_hidden_layers")
    kinds = c.each_layer("layer_types", layers, lambda i: shared.FULL if i % 2 else shared.SLIDING)
    scores = {"scale": c.positive("query_pre_attn_scalar") ** -0.5, "softcap": c.number("attn_logit_softcapping", None)}
    return gemma(c, kinds, scores, dict.fromkeys(set(kinds), "main"), positions={"main": c.rope()})


def gemma(c: Config, kinds: tuple[str, ...], scores: Tree, position: Tree, **more: object) -> Tree:
    """What Gemma 2 and 3 share. position: the scheme of each kind of layer."""
    norm = shared.rmsnorm(c, weight="plus_one")
    c.must_be("use_bidirectional_attention", False)

    def block(kind: str, sees: Tree) -> Tree:
        mixer = shared.attention(c, sees=sees, scores=scores, position=position[kind], qk_norm=more.get("qk_norm"))
        mixer["bias"] = shared.biases(c)
        act = "hidden_activation" if c.has("hidden_activation") else "hidden_act"
        c.ignore("hidden_act", "hidden_activation")
        return {"mixer": mixer, "ffn": shared.gated(c, act), "norm": {"place": "sandwich", "kind": norm}}

    full, sliding = shared.FULL, shared.SLIDING
    made = {full: lambda: block(full, {}), sliding: lambda: block(sliding, shared.window(c))}
    blocks, pattern = shared.by_kind(c, kinds, made)
    tree = shared.decoder(c, blocks, pattern, tie=True, final_norm=norm, positions=more["positions"])
    tree["head"]["softcap"] = c.number("final_logit_softcapping", None)
    return {**tree, "embed": {"kind": "token", "scale": c.integer("hidden_size") ** 0.5}}


def hugging_face(spec: ModelSpec) -> Tree:
    return gemma_keys(spec, "gemma2", "Gemma2ForCausalLM") | outward.rope(spec)


def gemma_keys(spec: ModelSpec, model_type: str, architecture: str) -> Tree:
    """What Gemma 2's and 3's configurations share: all but RoPE."""
    outward.whole_heads(spec)
    found = outward.decoder(spec, model_type, architecture)
    return {
        **found,
        "hidden_activation": found["hidden_act"],
        "attention_bias": outward.biased(spec),
        "query_pre_attn_scalar": outward.query_scalar(spec),
        "sliding_window": outward.window(spec),
        "layer_types": outward.layer_types(spec),
        "attn_logit_softcapping": outward.part(spec, "mixer", "gqa").scores.softcap,
        "final_logit_softcapping": outward.of_kind(spec.head, "head", "lm").softcap,
    }

"""DeepSeek-V3 and R1: latent attention, then the mixture that GLM-4.5 took over. arXiv 2412.19437."""

from __future__ import annotations

import math
from typing import Any

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.families import glm4_moe
from assay.hub.family import Names
from assay.hub.rules import Pairs
from assay.spec.model import ModelSpec

TYPES = ("deepseek_v3",)
SAME, skip = shared.SAME, glm4_moe.skip
MIXER, ATTENTION = "blocks.*.mixer", "model.layers.*.self_attn"


def names(model: ModelSpec) -> Names:
    """The files' RoPE turns neighbouring dimensions of the last `rope_dim` rows of each query and of the shared key."""
    mixer: Any = next(branch.mixer for _, _, branch in model.branches(0) if branch.mixer is not None)
    size = mixer.nope_dim + mixer.rope_dim

    def queries(name: str) -> Pairs:
        return Pairs(f"{ATTENTION}.{name}.*", size, mixer.nope_dim)

    own: Names = {
        f"{MIXER}.q.*": queries("q_proj"),
        f"{MIXER}.q_down.*": f"{ATTENTION}.q_a_proj.*",
        f"{MIXER}.q_norm.*": f"{ATTENTION}.q_a_layernorm.*",
        f"{MIXER}.q_up.*": queries("q_b_proj"),
        f"{MIXER}.kv_down.*": Pairs(f"{ATTENTION}.kv_a_proj_with_mqa.*", mixer.kv_rank + mixer.rope_dim, mixer.kv_rank),
        f"{MIXER}.kv_norm.*": f"{ATTENTION}.kv_a_layernorm.*",
        f"{MIXER}.kv_up.*": f"{ATTENTION}.kv_b_proj.*",
    }
    return shared.over(own, glm4_moe.NAMES)


def spec(c: Config) -> Tree:
    c.must_be("rope_interleave", True)
    layers = c.integer("num_hidden_layers")
    first = c.integer("first_k_dense_replace", 3, least=0)
    c.ignore("num_nextn_predict_layers", "num_mtp_layers")
    return decoder(c, tuple("dense" if i < first else "sparse" for i in range(layers)), attention(c))


def attention(c: Config) -> Tree:
    """The norms of the latents have an epsilon of their own, which no configuration says."""
    heads = c.integer("num_attention_heads")
    c.must_be("num_key_value_heads", heads, why="all heads share one latent")
    c.ignore("head_dim", "qk_head_dim")
    nope, rope = c.integer("qk_nope_head_dim", 128), c.integer("qk_rope_head_dim", 64)
    return {
        "kind": "mla",
        "heads": heads,
        "kv_rank": c.integer("kv_lora_rank", 512),
        "q_rank": c.integer("q_lora_rank", None),
        "nope_dim": nope,
        "rope_dim": rope,
        "value_dim": c.integer("v_head_dim", 128),
        "position": "main",
        "scale": (nope + rope) ** -0.5 * gain(c) ** 2,
        "norm": {"kind": "rmsnorm", "eps": 1e-6},
        "bias": c.flag("attention_bias", False),
    }


def gain(c: Config) -> float:
    """What transformers multiplies q and k with beside RoPE's own gain: 0.1 mscale_all_dim ln(factor) + 1."""
    rules = c.rope_rules()
    mscale, factor = rules.get("mscale_all_dim") or 0.0, rules.get("factor", 1.0)
    plain = rules.get("rope_type", rules.get("type", "default")) == "default"
    return 1.0 if plain or factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def position(c: Config) -> Tree:
    """RoPE; of the two mscales a lone one does not act on cos and sin."""
    found = c.rope()
    scaling = found.get("scaling", {})
    if not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        scaling.pop("mscale", None)
        scaling.pop("mscale_all_dim", None)
    return found


def decoder(c: Config, kinds: tuple[str, ...], mixer: Tree) -> Tree:
    norm = shared.rmsnorm(c)
    sparse, dense = glm4_moe.mixture(c), shared.gated(c)
    made = {
        "dense": lambda: {"mixer": mixer, "ffn": dense, "norm": {"kind": norm}},
        "sparse": lambda: {"mixer": mixer, "ffn": sparse, "norm": {"kind": norm}},
    }
    blocks, pattern = shared.by_kind(c, kinds, made)
    return shared.decoder(c, blocks, pattern, positions={"main": position(c)})


def hugging_face(spec: ModelSpec) -> Tree:
    return {
        **outward.basics(spec, "deepseek_v3", "DeepseekV3ForCausalLM"),
        **latent_outward(spec),
        **rope_outward(spec),
        **glm4_moe.mixture_outward(spec),
        "rms_norm_eps": outward.epsilon(spec),
        "rope_interleave": True,
    }


def latent_outward(spec: ModelSpec) -> Tree:
    """The keys of `attention`."""
    mixer = outward.part(spec, "mixer", "mla")
    return {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.heads,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.q_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "attention_bias": mixer.bias,
    }


def rope_outward(spec: ModelSpec) -> Tree:
    """RoPE; a scale of the scores beyond that of their width is an mscale_all_dim."""
    mixer, scheme = outward.part(spec, "mixer", "mla"), outward.position(spec, "rope", mixer="mla")
    rules = outward.rope_rules(spec, scheme, mixer.rope_dim)
    gained = 1.0 if mixer.scale is None else math.sqrt(mixer.scale * math.sqrt(mixer.nope_dim + mixer.rope_dim))
    if "mscale_all_dim" not in rules and gained != 1 and rules.get("factor", 1.0) > 1:
        rules["mscale_all_dim"] = round((gained - 1) / (0.1 * math.log(rules["factor"])), 6)
    return outward.both_dialects(scheme, rules)

"""What most families say alike: the fields of a decoder, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.hub.rules import Experts
from assay.spec.model import ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"

EMBED: Names = {"embed.weight": "model.embed_tokens.weight"}
ATTENTION: Names = {
    "blocks.*.mixer_norm.*": "model.layers.*.input_layernorm.*",
    "blocks.*.mixer.q.*": "model.layers.*.self_attn.q_proj.*",
    "blocks.*.mixer.k.*": "model.layers.*.self_attn.k_proj.*",
    "blocks.*.mixer.v.*": "model.layers.*.self_attn.v_proj.*",
    "blocks.*.mixer.out.*": "model.layers.*.self_attn.o_proj.*",
    "blocks.*.mixer.q_norm.*": "model.layers.*.self_attn.q_norm.*",
    "blocks.*.mixer.k_norm.*": "model.layers.*.self_attn.k_norm.*",
}
GATED: Names = {
    "blocks.*.ffn_norm.*": "model.layers.*.post_attention_layernorm.*",
    "blocks.*.ffn.gate.*": "model.layers.*.mlp.gate_proj.*",
    "blocks.*.ffn.up.*": "model.layers.*.mlp.up_proj.*",
    "blocks.*.ffn.down.*": "model.layers.*.mlp.down_proj.*",
}
EXPERTS: Names = {
    "blocks.*.ffn.router.map.weight": "model.layers.*.mlp.gate.weight",
    "blocks.*.ffn.gate": Experts("model.layers.*.mlp.experts.#.gate_proj.weight"),
    "blocks.*.ffn.up": Experts("model.layers.*.mlp.experts.#.up_proj.weight"),
    "blocks.*.ffn.down": Experts("model.layers.*.mlp.experts.#.down_proj.weight"),
}
HEAD: Names = {"final_norm.*": "model.norm.*", "head.out.*": "lm_head.*"}
LLAMA: Names = {**EMBED, **ATTENTION, **GATED, **HEAD}
"""Llama's names, which most decoders kept."""

SKIP = {
    "model.layers.*.self_attn.rotary_emb.inv_freq": "RoPE's frequencies follow from the configuration",
}
SAME = {"lm_head.weight": "model.embed_tokens.weight"}


def layers_with(model: ModelSpec, kind: str) -> list[int]:
    """The layers that have a mixer of this kind: where its tensors have names of their own."""
    return [i for i in range(model.layers) if any(b.part.kind_name() == kind for _, _, b in model.branches(i))]


def over(own: Names, base: Names = LLAMA) -> Names:
    """The base's names with a family's own before them and in place of them: the first that matches counts."""
    return {**own, **base, **own}


def rmsnorm(c: Config, **more: Any) -> Tree:
    return {"kind": "rmsnorm", "eps": c.number("rms_norm_eps", 1e-6), **more}


def attention(c: Config, **more: Any) -> Tree:
    """A `gqa` mixer from the usual keys, its position scheme under the name `main`."""
    heads = c.integer("num_attention_heads")
    return {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": c.integer("num_key_value_heads", heads),
        "head_dim": c.head_size(),
        "position": "main",
        **more,
    }


def biases(c: Config, default: bool = False) -> str:
    """`bias` of attention: on all four maps or on none, as `attention_bias` says."""
    return "all" if c.flag("attention_bias", default) else "none"


def gated(c: Config, act: str = "hidden_act", **more: Any) -> Tree:
    return {"kind": "gated", "width": c.integer("intermediate_size"), "act": c.activation(act), **more}


def window(c: Config, name: str = "sliding_window") -> Tree:
    """`sees` of a layer with a sliding window: as many keys as transformers lets a query see, itself included."""
    return {"window": c.integer(name)}


def window_if_any(c: Config) -> Tree:
    """`sees` of every layer where a window may be left out or null."""
    return window(c) if c.has("sliding_window") else {}


def one_global_in(c: Config, every: int) -> tuple[str, ...]:
    """The kinds of layers where each `every`-th one attends fully: `layer_types`, else `sliding_window_pattern`."""
    every = c.integer("sliding_window_pattern", c.integer("_sliding_window_pattern", every))
    return c.each_layer("layer_types", c.integer("num_hidden_layers"), lambda i: SLIDING if (i + 1) % every else FULL)


def decoder(c: Config, blocks: Tree, pattern: tuple[str, ...] = (), tie: bool = False, **more: Any) -> Tree:
    """A decoder from the usual keys. `more` replaces or adds fields of the model."""
    tree = {
        "d_model": c.integer("hidden_size"),
        "vocab": c.integer("vocab_size"),
        "layers": c.integer("num_hidden_layers"),
        "context": c.integer("max_position_embeddings"),
        "blocks": blocks,
        "pattern": pattern,
        "final_norm": rmsnorm(c) if "final_norm" not in more else None,
        "head": {"kind": "lm", "tie": c.flag("tie_word_embeddings", tie)},
    }
    return {**tree, **more}


def windowed(c: Config, block: Callable[[Tree], Tree]) -> tuple[Tree, tuple[str, ...]]:
    """Blocks and pattern of a model whose layers attend fully or through a window: `layer_types`, else Qwen's
    `use_sliding_window` from layer `max_window_layers` on."""
    layers, first = c.integer("num_hidden_layers"), c.integer("max_window_layers", 0, least=0)
    wanted = c.flag("use_sliding_window", False) and c.has("sliding_window")
    kinds = c.each_layer("layer_types", layers, lambda i: SLIDING if wanted and i >= first else FULL)
    c.ignore("sliding_window")
    return by_kind(c, kinds, {FULL: lambda: block({}), SLIDING: lambda: block(window(c))})


def by_kind(c: Config, kinds: tuple[str, ...], made: Mapping[str, Callable[[], Tree]]) -> tuple[Tree, tuple[str, ...]]:
    """One block for each kind of layer that occurs, under a short name, and which layer has which."""
    if unknown := sorted(set(kinds) - made.keys()):
        raise ValueError(f"{c.where}: layer_types: {unknown[0]!r}; accepted: {', '.join(made)}")
    names = {kind: kind.removesuffix("_attention") for kind in made}
    return {names[kind]: made[kind]() for kind in made if kind in kinds}, tuple(names[kind] for kind in kinds)

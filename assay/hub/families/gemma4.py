"""Gemma 4, text: a head size and a RoPE for each kind of layer, values tied to keys, shared keys, per-layer embeddings,
experts beside the dense network. Google 2026."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.hub.rules import Packed, Place, Rule
from assay.spec.model import ModelSpec

TYPES = ("gemma4_text", "gemma4")
SAME = shared.SAME
OTHERWISE = (("model.", "model.language_model."),)
TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
LAYER = "model.layers.*"


@dataclass(frozen=True)
class Times(Rule):
    """One tensor is one parameter, but for a factor."""

    factor: float = 1.0

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [tensors[0] * self.factor]

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [ours[0] / self.factor]


def names(model: ModelSpec) -> Names:
    mixed = any("experts" in branch.name for stage in model.expand()[0] for branch in stage.branches if branch.name)
    own: Names = {
        "blocks.*.mixer_post.*": f"{LAYER}.post_attention_layernorm.*",
        "blocks.*.ffn_norm.*": f"{LAYER}.pre_feedforward_layernorm.*",
        "blocks.*.ffn_post.*": f"{LAYER}.post_feedforward_layernorm{'_1' if mixed else ''}.*",
        "blocks.*.experts_post.*": f"{LAYER}.post_feedforward_layernorm_2.*",
        "blocks.*.experts.norm.*": f"{LAYER}.pre_feedforward_layernorm_2.*",
        "blocks.*.experts.router.norm.weight": Times(f"{LAYER}.router.scale", model.d_model**-0.5),
        "blocks.*.experts.router.map.weight": f"{LAYER}.router.proj.weight",
        "blocks.*.experts.router.expert_gain": f"{LAYER}.router.per_expert_scale",
        "blocks.*.experts.{gate,up}": Packed(f"{LAYER}.experts.gate_up_proj", transposed=False),
        "blocks.*.experts.down": f"{LAYER}.experts.down_proj",
        "blocks.*.residual1.output_norm.*": f"{LAYER}.post_feedforward_layernorm.*",
        "blocks.*.residual*.scalar": f"{LAYER}.layer_scalar",
        "blocks.*.per_layer.table": "model.embed_tokens_per_layer.weight",
        "blocks.*.per_layer.map.weight": "model.per_layer_model_projection.weight",
        "blocks.*.per_layer.norm.weight": "model.per_layer_projection_norm.weight",
        "blocks.*.per_layer.gate.*": f"{LAYER}.per_layer_input_gate.*",
        "blocks.*.per_layer.down.*": f"{LAYER}.per_layer_projection.*",
        "blocks.*.per_layer_post.*": f"{LAYER}.post_per_layer_input_norm.*",
    }
    return shared.over(own)


def skip(model: ModelSpec) -> dict[str, str]:
    """Layers that take their keys from another carry maps of their own in some files; nothing reads them."""
    takers = [i for i in range(model.layers) if any(getattr(b.part, "takes", None) for _, _, b in model.branches(i))]
    unused = {f"model.layers.{i}.self_attn.{x}.*": "its keys are another layer's" for i in takers for x in UNUSED}
    unused |= {f"model.{tower}.**": "images and sound are not read: the language model alone" for tower in TOWERS}
    return {**shared.SKIP, **unused}


UNUSED = ("k_proj", "v_proj", "k_norm")


def spec(c: Config) -> Tree:
    """Of the language model, also where towers for images and sound stand beside it."""
    if c.text("model_type") == "gemma4":
        c.ignore("vision_config", "audio_config", "tie_word_embeddings")
        c.ignore(*(k for k in c.values if k.endswith(("_token_id", "_token_index"))))
        c = c.inner("text_config")
    layers = c.integer("num_hidden_layers")
    kinds = c.each_layer("layer_types", layers, lambda i: shared.SLIDING if (i + 1) % 6 else shared.FULL)
    kinds = (*kinds[:-1], shared.FULL)
    c.must_be("use_bidirectional_attention", False, "vision")
    blocks: Tree = {}
    pattern = []
    for i, kind in enumerate(kinds):
        block = {"stages": stages(c, i, kinds)}
        name = next((n for n, known in blocks.items() if known == block), None)
        if name is None:
            name = f"{kind.removesuffix('_attention')}_{i}"
            blocks[name] = block
        pattern.append(name)
    tables = {kind.removesuffix("_attention"): rope(c, kind) for kind in sorted(set(kinds))}
    tree = shared.decoder(c, blocks, tuple(pattern), tie=True, positions=tables)
    tree["head"]["softcap"] = c.number("final_logit_softcapping", None)
    return {**tree, "embed": {"kind": "token", "scale": c.integer("hidden_size") ** 0.5}}


def rope(c: Config, kind: str) -> Tree:
    """Local layers turn whole heads; global ones a share of the pairs of each."""
    full = kind == shared.FULL
    usual = {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.25} if full else {}
    rules = {**usual, **c.rope_rules(kind)}
    found: Tree = {"kind": "rope", "theta": float(rules.get("rope_theta", 1e4))}
    if rules.get("rope_type", "default") != "proportional":
        return {**found, "scaling": c.scaling(rules)}
    if rules.get("factor", 1.0) != 1.0:
        raise ValueError(f"{c.where}: rope_parameters: factor: {rules['factor']}; accepted with proportional: 1.0")
    share = rules.get("partial_rotary_factor", 1.0)
    return {**found, "scaling": {"kind": "proportional", "share": share} if share != 1.0 else None}


def stages(c: Config, layer: int, kinds: tuple[str, ...]) -> list[Tree]:
    """Attention, the feed-forward networks, and the layer's own embedding; the last stage scales the stream."""
    norm = shared.rmsnorm(c)
    takes = layer >= len(kinds) - c.integer("num_kv_shared_layers", 0, least=0)
    first = {"mixer": attention(c, layer, kinds, takes), "pre": norm, "post": norm, "name": "mixer"}
    wide = 2 if c.flag("use_double_wide_mlp", False) and takes else 1
    dense = shared.gated(c, "hidden_activation")
    dense["width"] *= wide
    second = [{"ffn": dense, "pre": norm, "post": norm, "name": "ffn"}]
    mixed = c.flag("enable_moe_block", False)
    if mixed:
        second.append({"ffn": mixture(c, norm), "post": norm, "name": "experts"})
    else:
        c.ignore("num_experts", "top_k_experts", "moe_intermediate_size")
    size = c.integer("hidden_size_per_layer_input", 256, least=0)
    rows = c.integer("vocab_size_per_layer_input", 262_144)
    joined = {"kind": "scaled", "output_norm": norm if mixed else None, "scalar": not size}
    found: list[Tree] = [{"branches": [first]}, {"branches": second}]
    found[1]["residual"] = joined if mixed or not size else "add"
    if size:
        own: Tree = {"kind": "per_layer", "width": size, "act": dense["act"]}
        own |= {"vocab": rows, "norm": norm} if layer == 0 else {}
        found.append({"branches": [{"ffn": own, "post": norm, "name": "per_layer"}], "residual": "scaled"})
    return found


def attention(c: Config, layer: int, kinds: tuple[str, ...], takes: bool) -> Tree:
    """The mixer of a layer. The last layers of a kind take keys and values from the last one before them."""
    kind, norm = kinds[layer], shared.rmsnorm(c)
    full = kind == shared.FULL
    mixer = shared.attention(
        c, **sizes(c, layer, full), position=kind.removesuffix("_attention"), scores={"scale": 1.0}
    )
    mixer["bias"] = shared.biases(c)
    mixer["sees"] = {} if full else {"window": c.integer("sliding_window", 512)}
    mixer["qk_norm"] = {"norm": norm}
    own = kinds[: len(kinds) - c.integer("num_kv_shared_layers", 0, least=0)]
    if takes:
        if kind not in own:
            raise ValueError(f"{c.where}: num_kv_shared_layers: no earlier layer of kind {kind} has keys to share")
        return {**mixer, "takes": kind}
    mixer["values"] = {"tied": c.flag("attention_k_eq_v", False) and full, "norm": {**norm, "weight": "none"}}
    last = layer == max(i for i, k in enumerate(own) if k == kind)
    mixer["gives"] = kind if last and kind in kinds[len(own) :] else None
    return mixer


def sizes(c: Config, layer: int, full: bool) -> Tree:
    """Head size and key heads: listed for the layers that differ, or the older keys of the global layers."""
    listed = c.mapping("per_layer_config", None)
    older = c.integer("global_head_dim", 512), c.integer("num_global_key_value_heads", None)
    if listed is not None:
        own = Config(listed, f"{c.where}: per_layer_config").mapping(str(layer), {})
        inside = Config(own, f"{c.where}: per_layer_config: {layer}")
        head, groups = inside.integer("head_dim", None), inside.integer("num_key_value_heads", None)
        if inside.unread():
            raise ValueError(f"{inside.where}: {inside.unread()[0]}: accepted: head_dim, num_key_value_heads")
    elif full:
        head, groups = older[0], older[1] if c.flag("attention_k_eq_v", False) else None
    else:
        head = groups = None
    found = {"head_dim": head, "kv_heads": groups}
    return {name: value for name, value in found.items() if value is not None}


def mixture(c: Config, norm: Tree) -> Tree:
    router = {"kind": "topk", "k": c.integer("top_k_experts"), "norm": norm, "expert_gain": True, "balance": 0.0}
    return {
        "kind": "moe",
        "experts": c.integer("num_experts"),
        "width": c.integer("moe_intermediate_size"),
        "act": c.activation("hidden_activation"),
        "router": router,
        "norm": norm,
    }


def hugging_face(spec: ModelSpec) -> Tree:
    mixers = [outward.part(spec, "mixer", "gqa", i) for i in range(spec.layers)]
    takers = [i for i, mixer in enumerate(mixers) if mixer.takes is not None]
    kinds, net = outward.layer_types(spec), outward.part(spec, "ffn", "gated")
    last = outward.part(spec, "ffn", "gated", spec.layers - 1)
    return {
        **outward.sizes(spec, "gemma4_text", "Gemma4ForCausalLM"),
        **sizes_outward(spec, mixers, kinds),
        **beside_outward(spec),
        "rope_parameters": {kind: rope_outward(spec, kind, kinds) for kind in (shared.FULL, shared.SLIDING)},
        "rms_norm_eps": outward.epsilon(spec),
        "attention_bias": outward.biased(spec),
        "attention_k_eq_v": any(mixer.values.tied for mixer in mixers),
        "num_kv_shared_layers": len(takers),
        "layer_types": kinds,
        "sliding_window": outward.window(spec) or 512,
        "intermediate_size": net.width,
        "use_double_wide_mlp": bool(takers) and last.width != net.width,
        "hidden_activation": outward.activation(net),
        "final_logit_softcapping": outward.of_kind(spec.head, "head", "lm").softcap,
    }


def sizes_outward(spec: ModelSpec, mixers: list[Any], kinds: list[str]) -> Tree:
    """The keys of `sizes`: those of the local layers, and the layers that differ from them."""
    usual = kinds.index(shared.SLIDING) if shared.SLIDING in kinds else 0
    each = [
        {"head_dim": mixer.size(spec.site(i)), "num_key_value_heads": mixer.groups} for i, mixer in enumerate(mixers)
    ]
    return {**each[usual], "per_layer_config": {str(i): own for i, own in enumerate(each) if own != each[usual]}}


def rope_outward(spec: ModelSpec, kind: str, kinds: list[str]) -> Tree:
    """Of a kind of layer that there is not, RoPE as it is."""
    if kind not in kinds:
        return {"rope_theta": 1e4, "rope_type": "default"}
    layer = kinds.index(kind)
    scheme = outward.position(spec, "rope", layer)
    if scheme.scaling is None or scheme.scaling.kind != "proportional":
        return outward.rope_rules(spec, scheme, outward.head_size(spec, layer))
    share = {"partial_rotary_factor": scheme.scaling.share}
    return {"rope_theta": scheme.theta, "rope_type": "proportional", **share}


def beside_outward(spec: ModelSpec) -> Tree:
    """What stands beside the dense network: experts, and an embedding for each layer."""
    own, moe = outward.at(spec, "per_layer", 0), outward.at(spec, "experts", 0)
    found: Tree = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": spec.vocab}
    if own is not None:
        own = outward.of_kind(own, "blocks.0.per_layer", "per_layer")
        found = {"hidden_size_per_layer_input": own.width, "vocab_size_per_layer_input": own.vocab}
    if moe is None:
        return {**found, "enable_moe_block": False}
    moe = outward.of_kind(moe, "blocks.0.experts", "moe")
    router = outward.of_kind(moe.router, "blocks.0.experts.router", "topk")
    experts = {"num_experts": moe.experts, "top_k_experts": router.k, "moe_intermediate_size": moe.width}
    return {**found, **experts, "enable_moe_block": True}

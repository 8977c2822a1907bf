"""Gemma 4, text: a head size and a RoPE for each kind of layer, values tied to keys, shared keys, per-layer embeddings,
experts beside the dense network. Google 2026."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from assay.hub import shared
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

"""A spec in the keys of Hugging Face's configurations: `config.py` and `shared.py` the other way round.

Nothing here decides whether a family has a spec: it writes down what a configuration has keys for, and `express` reads
the result back and compares.
"""

from __future__ import annotations

from typing import Any

from assay.hub.config import SCALINGS, Tree
from assay.hub.shared import FULL, SLIDING
from assay.spec.model import ModelSpec

ACTS = {"silu": "silu", "relu": "relu", "relu2": "relu2", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our activations -> Hugging Face's names."""


def part(spec: ModelSpec, name: str, kind: str, layer: int | None = None) -> Any:
    """The mixer or ffn of a layer; null: of the first layer that has one of this kind. ValueError for a layer without
    one, or with another kind."""
    layer = first(spec, name, kind) if layer is None else layer
    return of_kind(at(spec, name, layer), f"blocks.{layer}.{name}", kind)


def first(spec: ModelSpec, name: str, kind: str) -> int:
    """The first layer whose mixer or ffn is of a kind; 0 where none is."""
    return next(iter(kinds_at(spec, name, kind)), 0)


def kinds_at(spec: ModelSpec, name: str, kind: str) -> list[int]:
    """The layers whose mixer or ffn is of a kind."""
    return [i for i in range(spec.layers) if kind_at(spec, name, i) == kind]


def at(spec: ModelSpec, name: str, layer: int) -> Any:
    return next((branch.part for site, _, branch in spec.branches(layer) if site.name.endswith(f".{name}")), None)


def kind_at(spec: ModelSpec, name: str, layer: int) -> str | None:
    """The kind of a layer's mixer or ffn; None for a layer without one."""
    found = at(spec, name, layer)
    return None if found is None else str(found.kind_name())


def of_kind(found: Any, where: str, kind: str) -> Any:
    if found is None or found.kind_name() != kind:
        raise ValueError(f"{where}: {None if found is None else found.kind_name()!r}; {kind!r} is expected")
    return found


def activation(net: Any) -> str:
    """Hugging Face's name of what a feed-forward network uses."""
    if net.act not in ACTS:
        raise ValueError(f"blocks.0.ffn.act: {net.act!r}; {', '.join(ACTS)} are expected")
    return ACTS[net.act]


def position(spec: ModelSpec, kind: str, layer: int | None = None, mixer: str = "gqa") -> Any:
    """The scheme that a layer's mixer names; null: of the first layer whose mixer is of this kind."""
    layer = first(spec, "mixer", mixer) if layer is None else layer
    name = part(spec, "mixer", mixer, layer).position
    return of_kind(spec.positions.get(name), f"blocks.{layer}.mixer.position", kind)


def head_size(spec: ModelSpec, layer: int | None = None) -> int:
    return int(part(spec, "mixer", "gqa", layer).size(spec.site(0)))


def learned(spec: ModelSpec) -> Any:
    """The one table of positions, with the norm behind it."""
    found = list(spec.positions.values())
    table = of_kind(found[0] if len(found) == 1 else None, "positions", "learned")
    of_kind(table.norm, "positions: norm", "layernorm")
    return table


def whole_heads(spec: ModelSpec, by_width: bool = False) -> None:
    """ValueError where d_model is not a multiple of the heads, which some configurations refuse; by_width: a head is
    as wide as that says, because the configuration has no key for another width."""
    mixer = part(spec, "mixer", "gqa")
    if spec.d_model % mixer.heads:
        raise ValueError(f"blocks.0.mixer.heads: {mixer.heads}; a divisor of d_model ({spec.d_model}) is expected")
    if by_width and head_size(spec) * mixer.heads != spec.d_model:
        wanted = spec.d_model // mixer.heads
        raise ValueError(f"blocks.0.mixer.head_dim: {head_size(spec)}; {wanted} (d_model / heads) is expected")


def epsilon(spec: ModelSpec, kind: str = "rmsnorm") -> float:
    return float(of_kind(spec.final_norm, "final_norm", kind).eps)


def basics(spec: ModelSpec, model_type: str, architecture: str) -> Tree:
    """What every decoder's configuration says, in the names that most use."""
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": spec.d_model,
        "vocab_size": spec.vocab,
        "num_hidden_layers": spec.layers,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": of_kind(spec.head, "head", "lm").tie,
    }


def untied(spec: ModelSpec) -> None:
    """ValueError for a head that reads the embedding's table, where transformers' model has its own, whatever is
    said."""
    if of_kind(spec.head, "head", "lm").tie:
        raise ValueError("head.tie: True; False is expected: transformers ties no head of this family")


def sizes(spec: ModelSpec, model_type: str, architecture: str) -> Tree:
    """That of a decoder with attention."""
    return basics(spec, model_type, architecture) | {"num_attention_heads": part(spec, "mixer", "gqa").heads}


def grouped(spec: ModelSpec) -> Tree:
    """Heads of keys and the size of all."""
    return {"num_key_value_heads": part(spec, "mixer", "gqa").groups, "head_dim": head_size(spec)}


def decoder(spec: ModelSpec, model_type: str, architecture: str, ffn: str = "gated") -> Tree:
    """The keys of Llama's configuration that its descendants share, without RoPE's."""
    net = part(spec, "ffn", ffn)
    return {
        **sizes(spec, model_type, architecture),
        **grouped(spec),
        "intermediate_size": net.width,
        "hidden_act": activation(net),
        "rms_norm_eps": epsilon(spec),
    }


def rope(spec: ModelSpec, layer: int | None = None, partial: bool = False) -> Tree:
    """RoPE in both dialects: `rope_parameters` for transformers 5, `rope_theta` and `rope_scaling` for its elders."""
    scheme = position(spec, "rope", layer)
    return both_dialects(scheme, rope_rules(spec, scheme, head_size(spec), partial))


def both_dialects(scheme: Any, rules: Tree) -> Tree:
    found: Tree = {"rope_parameters": rules, "rope_theta": scheme.theta}
    if scheme.scaling is not None:
        found["rope_scaling"] = {k: v for k, v in rules.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if "partial_rotary_factor" in rules:
        found["partial_rotary_factor"] = rules["partial_rotary_factor"]
    return found


def rope_rules(spec: ModelSpec, scheme: Any, size: int, partial: bool = False) -> Tree:
    """`rope_parameters` of one scheme, for heads of this size. partial: whether this family's model turns part of a
    head when it is told to."""
    scaling, dim = scheme.scaling, scheme.dim or size
    rules: Tree = {"rope_theta": scheme.theta, "rope_type": "default" if scaling is None else scaling.kind}
    if partial:
        rules["partial_rotary_factor"] = dim / size
    elif dim != size:
        raise ValueError(f"positions: rope: dim: {scheme.dim}; {size} (the whole head) is expected")
    if scaling is None:
        return rules
    if scaling.kind not in SCALINGS:
        raise ValueError(f"positions: rope: scaling: {scaling.kind!r}; {', '.join(SCALINGS)} are expected")
    if scaling.kind == "dynamic" and scaling.original != spec.context:
        raise ValueError(f"positions: rope: scaling.original: {scaling.original}; context ({spec.context}) is expected")
    given = {theirs: getattr(scaling, ours) for ours, theirs in SCALINGS[scaling.kind].items()}
    return rules | {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v is not None}


def layer_types(spec: ModelSpec) -> list[str]:
    windows = [part(spec, "mixer", "gqa", layer).sees.window for layer in range(spec.layers)]
    return [FULL if window is None else SLIDING for window in windows]


def window(spec: ModelSpec) -> int | None:
    """The window of the layers that have one."""
    windows = (part(spec, "mixer", "gqa", layer).sees.window for layer in range(spec.layers))
    return next((found for found in windows if found is not None), None)


def windowed(spec: ModelSpec) -> Tree:
    """Qwen's keys for windows in some layers."""
    kinds, seen = layer_types(spec), window(spec)
    found: Tree = {"layer_types": kinds, "use_sliding_window": seen is not None, "sliding_window": seen}
    upper = kinds.index(SLIDING) if SLIDING in kinds else spec.layers
    return found | {"max_window_layers": upper}


def query_scalar(spec: ModelSpec) -> int:
    """Gemma's `query_pre_attn_scalar`: an integer whose root divides the scores."""
    rule = part(spec, "mixer", "gqa").scores
    scale = head_size(spec) ** -0.5 if rule.scale is None else rule.scale
    if scale <= 0 or round(scale**-2) < 1 or round(scale**-2) ** -0.5 != scale:
        raise ValueError(f"blocks.0.mixer.scores.scale: {scale}; n ** -0.5 with a whole n is expected")
    return round(scale**-2)


def biased(spec: ModelSpec) -> bool:
    return bool(part(spec, "mixer", "gqa").bias == "all")

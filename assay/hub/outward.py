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


def part(spec: ModelSpec, name: str, kind: str, layer: int = 0) -> Any:
    """The mixer or ffn of a layer. ValueError for a layer without one, or with another kind."""
    return of_kind(at(spec, name, layer), f"blocks.{layer}.{name}", kind)


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


def position(spec: ModelSpec, kind: str, layer: int = 0) -> Any:
    """The scheme that a layer's mixer names."""
    name = part(spec, "mixer", "gqa", layer).position
    return of_kind(spec.positions.get(name), f"blocks.{layer}.mixer.position", kind)


def head_size(spec: ModelSpec) -> int:
    return int(part(spec, "mixer", "gqa").size(spec.site(0)))


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


def sizes(spec: ModelSpec, model_type: str, architecture: str) -> Tree:
    """What every decoder's configuration says, in the names that most use."""
    head = of_kind(spec.head, "head", "lm")
    mixer = part(spec, "mixer", "gqa")
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": spec.d_model,
        "vocab_size": spec.vocab,
        "num_hidden_layers": spec.layers,
        "max_position_embeddings": spec.context,
        "num_attention_heads": mixer.heads,
        "tie_word_embeddings": head.tie,
    }


def decoder(spec: ModelSpec, model_type: str, architecture: str, ffn: str = "gated") -> Tree:
    """The keys of Llama's configuration that its descendants share, without RoPE's."""
    net = part(spec, "ffn", ffn)
    return {
        **sizes(spec, model_type, architecture),
        "num_key_value_heads": part(spec, "mixer", "gqa").groups,
        "head_dim": head_size(spec),
        "intermediate_size": net.width,
        "hidden_act": activation(net),
        "rms_norm_eps": epsilon(spec),
    }


def rope(spec: ModelSpec, layer: int = 0, partial: bool = False) -> Tree:
    """RoPE in both dialects: `rope_parameters` for transformers 5, `rope_theta` and `rope_scaling` for its elders."""
    scheme = position(spec, "rope", layer)
    rules = rope_rules(spec, scheme, partial)
    found: Tree = {"rope_parameters": rules, "rope_theta": scheme.theta}
    if scheme.scaling is not None:
        found["rope_scaling"] = {k: v for k, v in rules.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if "partial_rotary_factor" in rules:
        found["partial_rotary_factor"] = rules["partial_rotary_factor"]
    return found


def rope_rules(spec: ModelSpec, scheme: Any, partial: bool = False) -> Tree:
    """`rope_parameters` of one scheme. partial: whether this family's model turns part of a head when it is told to."""
    size, scaling = head_size(spec), scheme.scaling
    rules: Tree = {"rope_theta": scheme.theta, "rope_type": "default" if scaling is None else scaling.kind}
    if scheme.dim is not None and scheme.dim != size:
        if not partial:
            raise ValueError(f"positions: rope: dim: {scheme.dim}; {size} (the whole head) is expected")
        rules["partial_rotary_factor"] = scheme.dim / size
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

"""DeepSeek-V3.2: V3 with an indexer in every layer that chooses which keys are attended to. arXiv 2512.02556."""

from __future__ import annotations

from assay.hub import outward
from assay.hub.config import Config, Tree
from assay.hub.families import deepseek_v3, glm4_moe
from assay.hub.family import Names
from assay.spec.model import ModelSpec

TYPES = ("deepseek_v32",)
SAME, skip = deepseek_v3.SAME, deepseek_v3.skip
OURS, THEIRS = f"{deepseek_v3.MIXER}.select", f"{deepseek_v3.ATTENTION}.indexer"


def names(model: ModelSpec) -> Names:
    """The indexer turns halves, as ours does, and its leading dimensions: its tensors are as they are."""
    own = {
        f"{OURS}.q.*": f"{THEIRS}.wq_b.*",
        f"{OURS}.k.*": f"{THEIRS}.wk.*",
        f"{OURS}.k_norm.*": f"{THEIRS}.k_norm.*",
        f"{OURS}.weigh.*": f"{THEIRS}.weights_proj.*",
    }
    return {**own, **deepseek_v3.names(model)}


def spec(c: Config) -> Tree:
    layers = c.integer("num_hidden_layers")
    first = c.integer("first_k_dense_replace", 3, least=0)
    kinds = c.each_layer("mlp_layer_types", layers, lambda i: "dense" if i < first else "sparse")
    c.must_be("layer_types", ["indexed_attention"] * layers)
    c.must_be("mlp_bias", False)
    c.ignore("num_nextn_predict_layers")
    mixer = deepseek_v3.attention(c)
    mixer["select"] = {
        "kind": "indexer",
        "heads": c.integer("index_n_heads", 64),
        "head_dim": c.integer("index_head_dim", 128),
        "keep": c.integer("index_topk", 2048),
        "norm": {"kind": "layernorm", "eps": 1e-6},
    }
    return deepseek_v3.decoder(c, kinds, mixer)


def hugging_face(spec: ModelSpec) -> Tree:
    mixer = outward.part(spec, "mixer", "mla")
    index = outward.of_kind(mixer.select, "blocks.0.mixer.select", "indexer")
    kinds = ["sparse" if outward.kind_at(spec, "ffn", i) == "moe" else "dense" for i in range(spec.layers)]
    return {
        **outward.basics(spec, "deepseek_v32", "DeepseekV32ForCausalLM"),
        **deepseek_v3.latent_outward(spec),
        **deepseek_v3.rope_outward(spec),
        **glm4_moe.mixture_outward(spec),
        "rms_norm_eps": outward.epsilon(spec),
        "mlp_layer_types": kinds,
        "layer_types": ["indexed_attention"] * spec.layers,
        "index_n_heads": index.heads,
        "index_head_dim": index.head_dim,
        "index_topk": index.keep,
    }

"""Gemma 3, text: five local layers to a global one, a RoPE for each, norms on queries and keys. arXiv 2503.19786."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.families.gemma2 import NAMES as NAMES
from assay.hub.families.gemma2 import gemma, gemma_keys
from assay.spec.model import ModelSpec

TYPES = ("gemma3_text",)
SKIP, SAME = shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    kinds = shared.one_global_in(c, 6)
    scores = {"scale": c.positive("query_pre_attn_scalar", c.head_size()) ** -0.5}
    scores["softcap"] = c.number("attn_logit_softcapping", None)
    local = c.number("rope_local_base_freq", 10_000.0)
    tables = {"global": c.rope(shared.FULL, theta=1_000_000.0)}
    newer = c.has("rope_parameters")
    tables["local"] = c.rope(shared.SLIDING) if newer else {"kind": "rope", "theta": local}
    return gemma(
        c,
        kinds,
        scores,
        {shared.FULL: "global", shared.SLIDING: "local"},
        positions=tables,
        qk_norm={"norm": shared.rmsnorm(c, weight="plus_one")},
    )


def hugging_face(spec: ModelSpec) -> Tree:
    found = gemma_keys(spec, "gemma3_text", "Gemma3ForCausalLM")
    kinds, ropes = found["layer_types"], {}
    for kind, theta in ((shared.FULL, 1_000_000.0), (shared.SLIDING, 10_000.0)):
        rules = {"rope_theta": theta, "rope_type": "default"}
        scheme = outward.position(spec, "rope", kinds.index(kind)) if kind in kinds else None
        ropes[kind] = rules if scheme is None else outward.rope_rules(spec, scheme, outward.head_size(spec))
    return {**found, "rope_parameters": ropes}

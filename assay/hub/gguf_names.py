"""What GGUF files call things, in Hugging Face's names: values of a header and tensors.

llama.cpp changes some numbers on the way in, which is undone here: it reorders the rows of queries and keys for
architectures whose RoPE turns neighbours, and adds one to Gemma's norms.
Source: convert_hf_to_gguf.py and gguf-py/gguf/tensor_mapping.py of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from assay.hub.gguf import Gguf

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.#.w1",
    "ffn_up_exps": "block_sparse_moe.experts.#.w3",
    "ffn_down_exps": "block_sparse_moe.experts.#.w2",
}
QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.#.gate_proj",
    "ffn_up_exps": "mlp.experts.#.up_proj",
    "ffn_down_exps": "mlp.experts.#.down_proj",
}
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}

USUAL = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
EXPERTS = {"expert_used_count": "num_experts_per_tok"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
MULTIPLIERS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
GELU = {"hidden_activation": "gelu_pytorch_tanh"}
SILU = {"hidden_act": "silu"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's name of a kind of model is read as one of Hugging Face's.

    keys, names: beyond USUAL and LAYER. fixed: what the name alone says. turned: queries and keys lie in neighbouring
    pairs. less: what was added to every norm.
    """

    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=lambda: SILU)
    turned: bool = False
    less: float = 0.0


LLAMA = Architecture("llama", turned=True)
ARCHITECTURES = {
    "llama": LLAMA,
    "granite": Architecture("granite", keys=MULTIPLIERS, turned=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture(
        "qwen3_moe",
        QWEN_EXPERTS,
        {**EXPERTS, "expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        {**SILU, "norm_topk_prob": True},
    ),
    "olmo2": Architecture("olmo2", AFTER),
    "gemma2": Architecture("gemma2", SANDWICH, {**WINDOW, **CAPS}, GELU, less=1.0),
    "gemma3": Architecture("gemma3_text", SANDWICH, {**WINDOW, **CAPS}, GELU, less=1.0),
}
EXPERT_LLAMA = Architecture("mixtral", MIXTRAL, {**EXPERTS, "expert_count": "num_local_experts"}, turned=True)
"""llama.cpp calls Mixtral `llama`, with experts."""


@dataclass(frozen=True)
class Piece:
    """Where a tensor of ours lies: a whole one, or one expert of it. heads: rows to put back in order; less: what to
    subtract."""

    name: str
    part: int | None = None
    heads: int = 0
    less: float = 0.0


class Renamed:
    """A file's tensors under Hugging Face's names, as these libraries keep them: the `Tensors` of an importer."""

    def __init__(self, file: Gguf, architecture: Architecture, config: Mapping[str, Any]) -> None:
        self.where, self._file = file.where, file
        self._layer = {**LAYER, **architecture.names}
        self._architecture, self._config = architecture, config
        self._pieces: dict[str, Piece] = {}
        for name, piece in (made for stored in file.tensors for made in self._of(stored)):
            if name in self._pieces:
                raise ValueError(f"{file.where}: {piece.name} and {self._pieces[name].name} are both {name}")
            self._pieces[name] = piece

    def _of(self, name: str) -> Iterator[tuple[str, Piece]]:
        stem, _, leaf = name.rpartition(".")
        if name == "rope_freqs.weight":
            return  # read into the configuration
        less = self._architecture.less if stem.endswith("norm") and leaf == "weight" else 0.0
        if not stem.startswith("blk."):
            yield f"{OUTER.get(stem, stem)}.{leaf}", Piece(name, less=less)
            return
        _, layer, *rest = stem.split(".")
        first, number = rest[0] if rest else "", rest[1] if len(rest) == 2 and rest[1].isdigit() else None
        theirs = self._layer.get(f"{first}_exps" if number is not None else ".".join(rest), stem)
        full = f"model.layers.{layer}.{theirs}.{leaf}"
        if number is not None:
            yield full.replace("#", number), Piece(name)
        elif "#" in theirs:
            for i in range(self._file.tensors[name].shape[0]):
                yield full.replace("#", str(i)), Piece(name, i)
        else:
            yield full, Piece(name, heads=self._heads(first), less=less)

    def _heads(self, stem: str) -> int:
        keys = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        if not self._architecture.turned or stem not in keys:
            return 0
        return int(self._config.get(keys[stem], self._config["num_attention_heads"]))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        piece = self._pieces[name]
        shape = self._file.tensors[piece.name].shape
        return shape if piece.part is None else shape[1:]

    def read(self, name: str) -> Tensor:
        """float32, whatever the file keeps."""
        piece = self._pieces[name]
        value = self._file.read(piece.name, piece.part)
        if piece.heads:
            # Rows of a head stand in neighbouring pairs; halves are what Hugging Face's families have.
            value = value.unflatten(0, (piece.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return value - piece.less if piece.less else value

"""GGUF files of Hugging Face models, by the `gguf` package: its names of tensors, its keys, its quantisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from torch import Tensor

ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
TURNED = ("llama", "mixtral", "granite")


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute: halves become neighbours."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def arch_of(config: Any) -> str:
    return ARCHITECTURES.get(config.model_type, config.model_type)


def header(writer: gguf.GGUFWriter, config: Any) -> None:
    """What convert_hf_to_gguf.py writes for a decoder."""
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rules = config.rope_parameters
    writer.add_rope_freq_base(rules.get("full_attention", rules)["rope_theta"])
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    if getattr(config, "num_experts_per_tok", None):
        writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def tensors(state: Mapping[str, Tensor], config: Any) -> dict[str, np.ndarray]:
    """Under llama.cpp's names, with its changes to the numbers."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch_of(config))
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, tensor in state.items():
        value = tensor.float().numpy()
        if config.model_type in TURNED and ".q_proj." in name:
            value = permute(value, config.num_attention_heads)
        if config.model_type in TURNED and ".k_proj." in name:
            value = permute(value, config.num_key_value_heads)
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if ".experts." in name:
            before, _, rest = name.partition(".experts.")
            experts.setdefault(f"{before}.experts.{rest.partition('.')[2]}", []).append(value)
        elif not (name == "lm_head.weight" and config.tie_word_embeddings):
            found[str(known.get_name(name, (".weight", ".bias")))] = value
    for name, values in experts.items():
        found[str(known.get_name(name, (".weight",)))] = np.stack(values)
    return found


def write(
    path: Path,
    config: Any,
    state: Mapping[str, Tensor],
    kind: Type = Type.F32,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """kind: of the matrices whose rows are whole blocks; everything else is float32."""
    writer = gguf.GGUFWriter(path, arch_of(config))
    header(writer, config)
    more(writer)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    for name, value in tensors(state, config).items():
        if value.ndim > 1 and value.shape[-1] % block == 0 and kind != Type.F32:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

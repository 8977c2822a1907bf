"""Configurations of published checkpoints, from their papers and cards, and the parameters that these were counted
with: a factor of 8 in what a line leaves out (a bias, a norm on queries, a tied head) is a different number."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def config(kind: str, d: int, layers: int, heads: tuple[int, int], width: int, vocab: int, **more: Any) -> Config:
    """Llama's keys; `heads` is (query heads, key heads)."""
    shape = {"hidden_size": d, "num_hidden_layers": layers, "intermediate_size": width, "vocab_size": vocab}
    shape |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "max_position_embeddings": 32_768}
    common = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": False}
    return {"model_type": kind, **common, **shape, **more}


TIED: Config = {"tie_word_embeddings": True}
GEMMA: Config = {"head_dim": 256, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh", **TIED}
GEMMA2 = {**GEMMA, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3 = {**GEMMA, "sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0}
GPT2: Config = {"model_type": "gpt2", "n_positions": 1024, "vocab_size": 50_257, "activation_function": "gelu_new"}
NEOX: Config = {
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "rotary_emb_base": 10_000,
}
EXPERTS: Config = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
QWEN_MOE: Config = {
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
BLOOM: Config = {
    "model_type": "bloom",
    "hidden_size": 14_336,
    "n_layer": 70,
    "n_head": 112,
    "vocab_size": 250_880,
    "layer_norm_epsilon": 1e-5,
    "apply_residual_connection_post_layernorm": False,
    "seq_length": 2048,
}

DEEPSEEK: Config = {
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}

PARAMETERS: dict[str, tuple[Config, int]] = {
    "Llama 2 7B": (config("llama", 4096, 32, (32, 32), 11_008, 32_000), 6_738_415_616),
    "Llama 2 13B": (config("llama", 5120, 40, (40, 40), 13_824, 32_000), 13_015_864_320),
    "Llama 2 70B": (config("llama", 8192, 80, (64, 8), 28_672, 32_000), 68_976_648_192),
    "Llama 3 8B": (config("llama", 4096, 32, (32, 8), 14_336, 128_256), 8_030_261_248),
    "Llama 3 70B": (config("llama", 8192, 80, (64, 8), 28_672, 128_256), 70_553_706_496),
    "Llama 3.2 1B": (config("llama", 2048, 16, (32, 8), 8192, 128_256, head_dim=64, **TIED), 1_235_814_400),
    "SmolLM2 135M": (config("llama", 576, 30, (9, 3), 1536, 49_152, **TIED), 134_515_008),
    "TinyLlama 1.1B": (config("llama", 2048, 22, (32, 4), 5632, 32_000), 1_100_048_384),
    "Mistral 7B": (config("mistral", 4096, 32, (32, 8), 14_336, 32_000, sliding_window=4096), 7_241_732_096),
    "Mixtral 8x7B": (config("mixtral", 4096, 32, (32, 8), 14_336, 32_000, **EXPERTS), 46_702_792_704),
    "Mixtral 8x22B": (config("mixtral", 6144, 56, (48, 8), 16_384, 32_768, **EXPERTS), 140_630_071_296),
    "Qwen2.5 0.5B": (config("qwen2", 896, 24, (14, 2), 4864, 151_936, **TIED), 494_032_768),
    "Qwen2.5 7B": (config("qwen2", 3584, 28, (28, 4), 18_944, 152_064), 7_615_616_512),
    "Qwen2.5 72B": (config("qwen2", 8192, 80, (64, 8), 29_568, 152_064), 72_706_203_648),
    "Qwen3 0.6B": (config("qwen3", 1024, 28, (16, 8), 3072, 151_936, head_dim=128, **TIED), 596_049_920),
    "Qwen3 8B": (config("qwen3", 4096, 36, (32, 8), 12_288, 151_936, head_dim=128), 8_190_735_360),
    "Qwen3 30B-A3B": (config("qwen3_moe", 2048, 48, (32, 4), 6144, 151_936, **QWEN_MOE), 30_532_122_624),
    "Gemma 2 2B": (config("gemma2", 2304, 26, (8, 4), 9216, 256_000, **GEMMA2), 2_614_341_888),
    "Gemma 2 9B": (config("gemma2", 3584, 42, (16, 8), 14_336, 256_000, **GEMMA2), 9_241_705_984),
    "Gemma 3 1B": (
        config("gemma3_text", 1152, 26, (4, 1), 6912, 262_144, **GEMMA3, sliding_window=512),
        999_885_952,
    ),
    "Phi-3 mini": (config("phi3", 3072, 32, (32, 32), 8192, 32_064), 3_821_079_552),
    "Pythia 6.9B": (config("gpt_neox", 4096, 32, (32, 32), 16_384, 50_432, **NEOX), 6_857_302_016),
    "GPT-NeoX 20B": (config("gpt_neox", 6144, 44, (64, 64), 24_576, 50_432, **NEOX), 20_554_567_680),
    "GPT-2": ({**GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12}, 124_439_808),
    "GPT-2 XL": ({**GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "BLOOM 176B": (BLOOM, 176_247_271_424),
    "DeepSeek-V3": (config("deepseek_v3", 7168, 61, (128, 128), 18_432, 129_280, **DEEPSEEK), 671_026_419_200),
}
ACTIVE = {"Mixtral 8x7B": 12_879_925_248, "Qwen3 30B-A3B": 3_353_032_704}
GEMMA3_27B = config(
    "gemma3_text", 5376, 62, (32, 16), 21_504, 262_208, **{**GEMMA3, "head_dim": 128}, sliding_window=1024
)

"""Decoding and reading of architecture families beside transformers' own implementation, on the same random weights.

Windows with soft caps, latent attention, experts, state spaces and delta rules, each of one size, one sequence, in
turns; medians. Used by benchmarks/performance.py.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from assay.engine.runner import Runner
from assay.hub.load import import_folder
from assay.measure.serving import Load, Serving
from assay.model.lm import LM

LAYERS, WIDTH, VOCAB = 6, 512, 8192
SHARED: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "intermediate_size": 1408,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 352}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads (Llama)": ("Llama", {}),
    "windows and soft caps (Gemma 2)": ("Gemma2", {"sliding_window": 128, "query_pre_attn_scalar": 64}),
    "latent attention (DeepSeek V3)": ("DeepseekV3", {
        "kv_lora_rank": 128, "q_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "first_k_dense_replace": LAYERS, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 352, "num_key_value_heads": 8, "head_dim": 32,
    }),
    "experts (Qwen 3 MoE)": ("Qwen3Moe", MOE),
    "state space (Mamba 2)": ("Mamba2", {
        "num_heads": 16, "head_dim": 64, "state_size": 64, "n_groups": 1, "expand": 2, "chunk_size": 128,
    }),
    "delta rule (Qwen 3 Next)": ("Qwen3Next", {
        **MOE, "mlp_only_layers": list(range(LAYERS)), "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "shared_expert_intermediate_size": 352,
    }),
}  # fmt: skip
PROMPT, NEW = 256, 32


class Peer:
    """A model of transformers, greedy, with its cache."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids

    @torch.inference_mode()
    def prefill(self) -> list[float]:
        start = time.perf_counter()
        out = self.model(self.ids, use_cache=True, logits_to_keep=1)
        took = time.perf_counter() - start
        # A model of states hands them back under another name.
        self.kept = {k: out[k] for k in ("past_key_values", "cache_params") if out.get(k) is not None}
        self.token, self.at = out.logits[:, -1].argmax(-1, keepdim=True), self.ids.shape[1]
        return [took]

    @torch.inference_mode()
    def decode(self) -> list[float]:
        self.prefill()
        found = []
        for _ in range(NEW):
            start = time.perf_counter()
            place = torch.tensor([self.at])
            more = {"cache_position": place} if "cache_params" in self.kept else {}
            out = self.model(self.token, use_cache=True, **self.kept, **more)
            self.token, self.at = out.logits[:, -1].argmax(-1, keepdim=True), self.at + 1
            found.append(time.perf_counter() - start)
        return found[2:]


class Ours(Peer):
    def __init__(self, model: LM) -> None:
        self.serving = Serving(model, Load(1, PROMPT + NEW, NEW, read=PROMPT))

    def prefill(self) -> list[float]:
        return [self.serving.prefill()[0][0]]

    def decode(self) -> list[float]:
        return [took for _ in range(8) for took in self.serving.decode()]


def pair(name: str) -> tuple[Any, LM]:
    """transformers' model of a family with random weights, and ours with the same."""
    import transformers

    kind, more = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SHARED, **more})
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = import_folder(Path(folder), dtype=torch.float32).model
    return theirs, ours


@torch.inference_mode()
def difference(theirs: Any, ours: LM, ids: torch.Tensor) -> float:
    """The largest relative difference between their logits and ours after the last of these tokens."""
    runner = Runner(ours, _size(ids.shape[1]))
    own = runner.feed([runner.open(ids.shape[1])], ids.tolist())
    other = theirs(ids, logits_to_keep=1).logits[:, -1]
    return float((own - other).abs().max() / other.abs().max())


def _size(tokens: int) -> Any:
    from assay.cache import Size

    return Size(1, tokens + 1, tokens)


def measured(names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    for name in names:
        theirs, ours = pair(name)
        ids = torch.randint(3, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        subjects: dict[str, Peer] = {"assay": Ours(ours), "transformers": Peer(theirs, ids)}
        times: dict[str, list[float]] = {}
        for one in subjects.values():
            one.prefill(), one.decode()
        for _ in range(rounds):
            for who, one in subjects.items():
                calls: dict[str, Callable[[], list[float]]] = {"prefill": one.prefill, "decode": one.decode}
                for what, call in calls.items():
                    times.setdefault(f"{who}.{what}", []).extend(call())
        rate = {key: (PROMPT if "prefill" in key else 1) / median(found) for key, found in times.items()}
        yield {
            "family": name,
            "params": sum(p.numel() for p in ours.parameters()),
            "difference": difference(theirs, ours, ids),
            **{f"{who}_{what}_tok_s": rate[f"{who}.{what}"] for who in subjects for what in ("prefill", "decode")},
            **{f"{what}_ratio": rate[f"assay.{what}"] / rate[f"transformers.{what}"] for what in ("prefill", "decode")},
        }

"""Decoding and reading of architecture families beside transformers' own implementation, on the same random weights.

    python benchmarks/families.py [--families Llama,Gemma2,...] [--dtypes f32,bf16] [--rounds N] [--threads N]
        [--out runs/performance/families.json]

Windows with soft caps, latent attention, experts, state spaces and delta rules, each of one size, one sequence, in
turns and each in a process of its own; medians, and the profile of a prefill that is short of what was wanted. Families
are named as transformers names their classes. What is measured takes the place of the same family and dtype in the
file, so that they may be measured one at a time: half a minute each on two cores. benchmarks/performance.py makes a
table of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from elsewhere import Elsewhere

from assay.engine.runner import Runner
from assay.hub.load import import_folder
from assay.measure.machine import environment
from assay.measure.profile import by_torch
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
    "Llama": ("grouped heads", {}),
    "Gemma2": ("windows and soft caps", {"sliding_window": 128, "query_pre_attn_scalar": 64}),
    "DeepseekV3": ("latent attention", {
        "kv_lora_rank": 128, "q_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "first_k_dense_replace": LAYERS, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 352, "num_key_value_heads": 8, "head_dim": 32,
    }),
    "Qwen3Moe": ("experts", MOE),
    "Mamba2": ("state space", {
        "num_heads": 16, "head_dim": 64, "state_size": 64, "n_groups": 1, "expand": 2, "chunk_size": 128,
    }),
    "Qwen3Next": ("delta rule", {
        **MOE, "mlp_only_layers": list(range(LAYERS)), "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "shared_expert_intermediate_size": 352,
    }),
}  # fmt: skip
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
PROMPT, NEW = 256, 32
WANTED = {"decode": 2.0, "prefill": 1.3}  # times transformers
READINGS = 8  # of a profile


class Peer:
    """A model of transformers from a folder, greedy, with its cache."""

    def __init__(self, kind: str, folder: Path, dtype: torch.dtype) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.ids, made = prompt(), getattr(transformers, f"{kind}ForCausalLM")
        self.model = made.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def last(self) -> list[float]:
        """Logits after the prompt."""
        found: list[float] = self.model(self.ids, logits_to_keep=1).logits[0, -1].tolist()
        return found

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


class Ours:
    def __init__(self, model: LM) -> None:
        self.serving = Serving(model, Load(1, PROMPT + NEW, NEW, read=PROMPT))

    def prefill(self) -> list[float]:
        return [self.serving.prefill()[0][0]]

    def decode(self) -> list[float]:
        return [took for _ in range(8) for took in self.serving.decode()]


class Alone:
    """Ours in a process of its own, which nothing was timed in."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.ours = Ours(import_folder(folder, dtype=dtype).model)

    def profile(self) -> list[dict[str, Any]]:
        """Which kernels the reading of a prompt goes to."""
        self.ours.prefill()
        return by_torch(self.ours.prefill, READINGS).rows("prefill", self.dtype)


def prompt() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def saved(kind: str, folder: Path) -> None:
    """transformers' model of a family with random weights."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SHARED, **FAMILIES[kind][1]})
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).float().save_pretrained(folder)


@torch.inference_mode()
def difference(theirs: Sequence[float], ours: LM) -> float:
    """The largest relative difference between their logits and ours after the prompt."""
    runner, ids = Runner(ours, _size(PROMPT)), prompt()
    own, other = runner.feed([runner.open(PROMPT)], ids.tolist()).float(), torch.tensor(theirs)
    return float((own - other).abs().max() / other.abs().max())


def _size(tokens: int) -> Any:
    from assay.cache import Size

    return Size(1, tokens + 1, tokens)


def measured(kinds: Sequence[str], dtypes: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            saved(kind, Path(folder))
            yield from (beside(kind, Path(folder), dtype, rounds) for dtype in dtypes)


def beside(kind: str, folder: Path, dtype: str, rounds: int) -> dict[str, Any]:
    ours = import_folder(folder, dtype=DTYPES[dtype]).model
    own, times = Ours(ours), dict[str, list[float]]()
    with Elsewhere(Peer, kind, folder, DTYPES[dtype]) as other:
        apart = difference(other("last"), ours)
        subjects: dict[str, Callable[[str], list[float]]] = {
            "assay": lambda w: getattr(own, w)(),
            "transformers": other,
        }
        for number in range(rounds + 1):
            for who, what in ((who, what) for who in subjects for what in ("prefill", "decode")):
                found = [took for _ in range(3 if what == "prefill" else 1) for took in subjects[who](what)]
                times.setdefault(f"{who}.{what}", []).extend(found if number else [])
    rate = {key: (PROMPT if "prefill" in key else 1) / median(found) for key, found in times.items()}
    ratios = {what: rate[f"assay.{what}"] / rate[f"transformers.{what}"] for what in WANTED}
    spent = []
    if ratios["prefill"] < WANTED["prefill"]:
        with Elsewhere(Alone, folder, DTYPES[dtype]) as alone:
            spent = alone("profile")
    return {
        "family": f"{FAMILIES[kind][0]} ({kind})",
        "dtype": dtype,
        "params": sum(p.numel() for p in ours.parameters()),
        "difference": apart,
        **{f"{who}_{what}_tok_s": rate[f"{who}.{what}"] for who in subjects for what in ("prefill", "decode")},
        **{f"{what}_ratio": ratio for what, ratio in ratios.items()},
        "profile": spent,
    }


def kept(file: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the file with these in the place of those of the same family and dtype."""
    old = json.loads(file.read_text("utf-8"))["rows"] if file.is_file() else []
    table = {(row["family"], row["dtype"]): row for row in [*old, *rows]}
    order = {f"{about} ({kind})": i for i, (kind, (about, _)) in enumerate(FAMILIES.items())}
    return [table[key] for key in sorted(table, key=lambda key: (order[key[0]], key[1] != "f32"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/performance/families.json"))
    given = parser.parse_args()
    for name, asked, accepted in (("families", given.families, FAMILIES), ("dtypes", given.dtypes, DTYPES)):
        if unknown := set(asked.split(",")) - set(accepted):
            parser.error(f"--{name}: {', '.join(sorted(unknown))}; accepted: {', '.join(accepted)}")
    torch.set_num_threads(given.threads)
    for row in measured(given.families.split(","), given.dtypes.split(","), given.rounds):
        print(
            json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items() if k != "profile"}),
            flush=True,
        )
        found = {"machine": environment(), "threads": given.threads, "rows": kept(given.out, [row])}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""What one CUDA device does with these models, beside a plain PyTorch GPT in the same run.

python benchmarks/gpu.py [train verb decode scans steps memory] [--out FILE.json]

`gpt-124m` is gpt-11m with 12 layers, 768 wide, 12 heads, a vocabulary of 50,304 and a context of 1,024. Prints a JSON
line a measurement and, with --out, writes all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.cost.bill import Question, Sheet
from assay.cost.memory import training as billed
from assay.measure.machine import matmul_flop_s, memory_byte_s
from assay.measure.serving import Load, Serving, roofline
from assay.measure.training import bench_recipe, utilisation
from assay.model.lm import build
from assay.ops.attend import Scores, attend, plan
from assay.ops.linear import linear
from assay.ops.packed import pack
from assay.ops.scan.delta import delta_rule, run
from assay.ops.sees import Sees
from assay.ops.step import InPages, Layout, View, rows_step
from assay.spec.load import load_model
from assay.spec.model import ModelSpec
from assay.train.learner import Learner
from assay.train.loop import dataset
from assay.train.utilisation import train_flops_per_token

CUDA = torch.device("cuda")
PEAK = 989.4e12  # dense bfloat16 FLOPs a second of an H100 SXM by its data sheet
SIZES: Mapping[str, Mapping[str, Any]] = {
    "gpt-11m": {},
    "gpt-124m": {
        "d_model": 768,
        "layers": 12,
        "vocab": 50304,
        "context": 1024,
        "blocks.*.mixer.heads": 12,
        "blocks.*.ffn.width": 3072,
    },
}
MIXERS: Mapping[str, Mapping[str, Any]] = {
    "gqa": {"kind": "gqa", "heads": 6, "position": "learned"},
    "mamba2": {"kind": "mamba2"},
    "gated_deltanet": {"kind": "gated_deltanet", "heads": 6},
    "gla": {"kind": "gla", "heads": 6},
    "rglru": {"kind": "rglru", "heads": 6},
}
Row = dict[str, Any]


def model(name: str, **changes: Any) -> ModelSpec:
    return load_model("gpt-11m", {**SIZES[name], **changes})


class Layer(nn.Module):
    """A GPT-2 block as people write it: the peer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Plain(nn.Module):
    """The same sizes as `model(name)`, with a tied head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        heads: int = spec.expand()[0][0].branches[0].part.heads  # type: ignore[attr-defined]
        self.embed, self.place = nn.Embedding(spec.vocab, spec.d_model), nn.Embedding(spec.context, spec.d_model)
        self.layers = nn.ModuleList(Layer(spec.d_model, heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.d_model, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def pace(step: Callable[[], object], warm: int = 5, steps: int = 20) -> float:
    """Seconds of a step, many between two waits."""
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def plain_step(spec: ModelSpec, batch: int, length: int, compiled: bool) -> Callable[[], None]:
    lm = Plain(spec).cuda()
    call = torch.compile(lm) if compiled else lm
    adamw = torch.optim.AdamW(lm.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(spec.vocab, (batch, length), device=CUDA)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = call(ids, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return step


def own_step(spec: ModelSpec, batch: int, length: int, compiled: bool) -> Callable[[], None]:
    learner = learner_of(spec, batch, length, compiled)
    number = iter(range(1 << 30))
    return lambda: void(learner.step(next(number), 1000))


def void(_: object) -> None:
    return None


def learner_of(spec: ModelSpec, batch: int, length: int, compiled: bool = False) -> Learner:
    recipe = bench_recipe(batch, length, "bfloat16")
    with TemporaryDirectory() as cache:
        return Learner(spec, recipe, dataset(recipe, Path(cache)), CUDA, compiled)


def training() -> Iterator[Row]:
    for name, batch in (("gpt-11m", 64), ("gpt-124m", 32)):
        spec = model(name)
        for who, make in (("assay", own_step), ("plain", plain_step)):
            for compiled in (False, True):
                yield measured(train_row, name, spec, batch, who, make, compiled)


def train_row(name: str, spec: ModelSpec, batch: int, who: str, make: Any, compiled: bool) -> Row:
    start = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    took = pace(make(spec, batch, spec.context, compiled))
    tok_s = batch * spec.context / took
    return {
        "model": name,
        "who": who,
        "compiled": compiled,
        "tok_s": round(tok_s),
        "of_peak": round(train_flops_per_token(spec, spec.context) * tok_s / PEAK, 4),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "all_s": round(time.perf_counter() - start, 1),
    }


def verbs() -> Iterator[Row]:
    """What `assay bench --train` says of the same."""
    for name, batch in (("gpt-11m", 64), ("gpt-124m", 32)):
        spec = model(name)
        yield measured(lambda s=spec, b=batch, n=name: {"model": n} | verb(s, b))


def verb(spec: ModelSpec, batch: int) -> Row:
    found = utilisation(spec, bench_recipe(batch, spec.context, "bfloat16"), CUDA, 10)
    return {"tok_s": round(found.train_tok_s), "mfu": round(found.mfu, 4), "rates": found.matmul_gflop_s}


def decoding() -> Iterator[Row]:
    for name in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            for batch in (1, 16):
                yield measured(decode_row, name, dtype, batch)


def decode_row(name: str, dtype: torch.dtype, batch: int) -> Row:
    spec = model(name)
    lm = build(spec, 0, CUDA).to(dtype).eval()
    load = Load(batch, spec.context, spec.context // 2)
    times, roof = Serving(lm, load).measure(3.0), roofline(lm, load)
    return {
        "model": name,
        "dtype": str(dtype),
        "batch": batch,
        "decode_tok_s": round(batch / times.gap, 1),
        "gap_ms": round(1e3 * times.gap, 3),
        "roofline_ms": round(1e3 * roof.decode_s, 4),
        "prefill_tok_s": round(batch * load.reading / times.prefill),
    }


def scans() -> Iterator[Row]:
    for length in (1024, 4096, 16384):
        for name, mixer in MIXERS.items():
            yield measured(scan_row, name, mixer, length)


def scan_row(name: str, mixer: Mapping[str, Any], length: int) -> Row:
    """16,384 tokens a step: forward and backward of six layers and the optimiser's step."""
    spec = load_model("gpt-11m", {"context": length, "blocks.*.mixer": dict(mixer)})
    torch.cuda.reset_peak_memory_stats()
    batch = 16384 // length
    took = pace(own_step(spec, batch, length, False), 2, 6)
    return {
        "mixer": name,
        "length": length,
        "tok_s": round(16384 / took),
        "step_ms": round(1e3 * took, 2),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def steps() -> Iterator[Row]:
    """What Triton's kernels save in a decode step: 8 rows, 32 heads over 8, 4,096 entries; weights of 4,096 x 4,096."""
    for name, call in {"attend": attend_step, "packed": packed_step, "scan": scan_step}.items():
        yield measured(step_row, name, call)


def step_row(name: str, call: Callable[[], Callable[[], object]]) -> Row:
    """Microseconds of a call with the kernels and without them."""
    step = call()
    with torch.inference_mode():
        mine = pace(step)
        with patch("assay.ops.triton.kernels", lambda _: None):
            return {"kernel": name, "triton_us": round(1e6 * mine, 1), "torch_us": round(1e6 * pace(step), 1)}


def attend_step() -> Callable[[], object]:
    step = rows_step(torch.zeros(8, 1, dtype=torch.long, device=CUDA), 4095)
    seq, index = (t.expand(8, 4096) for t in (step.seq[:, None], torch.arange(4096, device=CUDA)))
    q = torch.randn(8, 32, 128, device=CUDA, dtype=torch.bfloat16)
    pools = {name: torch.randn(2048, 16, 8, 128, device=CUDA, dtype=torch.bfloat16) for name in ("k", "v")}
    pages = InPages(pools, torch.randperm(2048, device=CUDA).view(8, 256))
    view = View(pages, Layout(seq, index, index, True))
    made = plan(step, view.layout, Sees())
    return lambda: attend(q, view, step, Sees(), Scores(128**-0.5), made)


def packed_step() -> Callable[[], object]:
    x, w = (torch.randn(n, 4096, device=CUDA, dtype=torch.bfloat16) for n in (8, 4096))
    held = pack(w.float(), 4).to(torch.bfloat16)
    return lambda: linear(x, held)


def scan_step() -> Callable[[], object]:
    q, k, v = (torch.randn(8, 1, 16, 128, device=CUDA) for _ in range(3))
    updates = delta_rule(q, F.normalize(k, dim=-1), v, torch.rand(8, 1, 16, device=CUDA))
    past = torch.zeros(8, 16, 128, 128, device=CUDA)
    return lambda: run(updates, past, keeps=True)


def memory() -> Iterator[Row]:
    """What `assay train` expects to need, what the bill says, and what torch's allocator held at most."""
    cases = {
        "gpt-11m": (model("gpt-11m"), 64),
        "gpt-124m": (model("gpt-124m"), 16),
        "mamba2": (load_model("gpt-11m", {"context": 1024, "blocks.*.mixer": dict(MIXERS["mamba2"])}), 16),
    }
    for name, (spec, batch) in cases.items():
        yield measured(memory_row, name, spec, batch)


def memory_row(name: str, spec: ModelSpec, batch: int) -> Row:
    torch.cuda.reset_peak_memory_stats()
    learner = learner_of(spec, batch, spec.context)
    need = learner.need()
    bill = billed(Sheet(spec), Question(spec.context, batch, "bf16", "bf16"))
    for step in range(3):
        learner.step(step, 100)
    held = torch.cuda.max_memory_allocated()
    told = {"expected_bytes": need.total, "activation_bytes": need.activations, "billed_bytes": bill.need.total}
    return {"model": name, "batch": batch, **told, "peak_bytes": held, "expected_share": round(need.total / held, 3)}


def measured(call: Callable[..., Row], *given: Any) -> Row:
    """The row, or what went wrong instead; the device's memory is free again after it."""
    try:
        return call(*given)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = [str(v) for v in given if isinstance(v, str | int)]
        return {
            "given": told,
            "error": f"{type(error).__name__}: {error}"[:300],
            "at": f"{where.filename}:{where.lineno}",
        }
    finally:
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()


PARTS: Mapping[str, Callable[[], Iterator[Row]]] = {
    "train": training,
    "verb": verbs,
    "decode": decoding,
    "scans": scans,
    "steps": steps,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[Row] = [
        {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "bf16_flop_s": matmul_flop_s(torch.bfloat16, CUDA),
            "memory_byte_s": memory_byte_s(device=CUDA),
        }
    ]
    print(json.dumps(rows[0]), flush=True)
    for part in given.parts:
        for row in PARTS[part]():
            rows.append({"part": part} | row)
            print(json.dumps(rows[-1]), flush=True)
            if given.out is not None:
                given.out.write_text(json.dumps(rows, indent=1), "utf-8")


if __name__ == "__main__":
    main()

"""docs/PERFORMANCE.md: what this machine allows, what assay reaches, and its peers in the same run.

    python benchmarks/performance.py [--sections single,families,contexts,training] [--checkpoint FOLDER]
        [--llama FOLDER] [--threads N] [--out runs/performance]

A section measures, writes `SECTION.json` to the folder, and the page is made of all that are there (and of
`serve.json`, from benchmarks/serve.py, where it is given with --serve). --sections "" only writes the page. llama.cpp
is its `llama-bench` in the folder --llama; what is not found is named on the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from assay.measure.machine import environment, matmul_flop_s, memory_byte_s

PAGE = Path(__file__).parents[1] / "docs/PERFORMANCE.md"
PROMPT, NEW, SECONDS = 512, 64, 4
OURS = ("f32", "bf16", "int8", "int4")
PEERS = {"f32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
"""Weights of as many bits, as llama.cpp's files have them."""


def bench(model: str, threads: int, *more: str) -> dict[str, Any]:
    """`assay bench --json` in a process of its own."""
    command = [sys.executable, "-m", "assay", "bench", model, "--threads", str(threads), "--json", *more]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def single(given: argparse.Namespace) -> dict[str, Any]:
    """One sequence of SmolLM2: reading and decoding, and which kernels took the time."""
    size = ("--prompt-len", str(PROMPT), "--new-tokens", str(NEW), "--seconds", str(SECONDS), "--profile")
    found: dict[str, Any] = {"floors": floors(given.checkpoint), "assay": {}, "peers": {}, "missing": {}}
    for dtype in OURS:
        found["assay"][dtype] = bench(str(given.checkpoint), given.threads, "--dtype", dtype, *size)
        found["peers"][f"llama.cpp {PEERS[dtype]}"] = guarded(found["missing"], "llama.cpp", llama, given, PEERS[dtype])
        if dtype in ("f32", "bf16"):
            name = f"transformers {dtype}"
            found["peers"][name] = guarded(found["missing"], "transformers", transformers, given, dtype)
    found["peers"] = {name: row for name, row in found["peers"].items() if row is not None}
    return found


def guarded(missing: dict[str, str], name: str, call: Callable[..., Any], *args: Any) -> Any:
    """What the peer measured; None, and why, where it is not there."""
    try:
        return call(*args)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        missing[name] = str(error)
        return None


def floors(checkpoint: Path) -> dict[str, Any]:
    size = (checkpoint / "model.safetensors").stat().st_size
    kinds = {"f32": torch.float32, "bf16": torch.bfloat16}
    rates = {name: matmul_flop_s(dtype) / 1e9 for name, dtype in kinds.items()}
    return {"memory_gb_s": memory_byte_s(size, torch.device("cpu")) / 1e9, "matmul_gflop_s": rates}


def export(given: argparse.Namespace, form: str, dtype: str) -> Path:
    folder: Path = given.out / f"{form}-{dtype}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "assay", "export", str(given.checkpoint), "--format", form, "--dtype", dtype]
        subprocess.run([*command, "--out", str(folder)], check=True, stdout=sys.stderr)
    return folder


def llama(given: argparse.Namespace, dtype: str) -> dict[str, float]:
    program = shutil.which("llama-bench", path=str(given.llama)) or shutil.which("llama-bench")
    if program is None:
        raise OSError("no llama-bench (--llama FOLDER)")
    file = next(export(given, "gguf", dtype).glob("*.gguf"))
    sizes = ["-p", str(PROMPT), "-n", str(NEW), "-d", "0", "-t", str(given.threads), "-r", "3", "-o", "json"]
    done = subprocess.run([program, "-m", str(file), *sizes], check=True, stdout=subprocess.PIPE, text=True)
    rows = json.loads(done.stdout)
    rate = {"prefill" if row["n_gen"] == 0 else "decode": median(row["samples_ts"]) for row in rows}
    return {"prefill_tok_s": rate["prefill"], "decode_tok_s": rate["decode"]}


@torch.inference_mode()
def transformers(given: argparse.Namespace, dtype: str) -> dict[str, float]:
    import transformers as hf

    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = hf.AutoModelForCausalLM.from_pretrained(export(given, "hf", "f32"), dtype=kind).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    reads, gaps = [], []
    for _ in range(3):
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        reads.append(time.perf_counter() - start)
        for _ in range(NEW // 2):
            start = time.perf_counter()
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            gaps.append(time.perf_counter() - start)
    return {"prefill_tok_s": PROMPT / median(reads), "decode_tok_s": 1 / median(gaps)}


def families(given: argparse.Namespace) -> dict[str, Any]:
    from families import DTYPES, FAMILIES, measured

    return {"rows": list(measured(list(FAMILIES), list(DTYPES), given.rounds))}


def training(given: argparse.Namespace) -> dict[str, Any]:
    from plain import SIZES, beside

    return {"rows": [beside(*size, given.rounds) for size in SIZES.values()]}


def contexts(given: argparse.Namespace) -> dict[str, Any]:
    from contexts import measured

    return measured((256, 1024, 4096))


SECTIONS: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "single": single, "families": families, "contexts": contexts, "training": training,
}  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def told(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        return "" if value is None else str(value)

    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(map(told, row))} |" for row in rows)])


def told_single(found: Mapping[str, Any]) -> str:
    rates = found["floors"]["matmul_gflop_s"]
    text = (
        f"Memory is read at {found['floors']['memory_gb_s']:.1f} GB/s in pieces as large as the weights; products of "
    )
    text += ", ".join(f"2048 in {name} make {rate:,.0f} GFLOP/s" for name, rate in rates.items()) + ".\n\n"
    rows, peers = [], found["peers"]
    for dtype, one in found["assay"].items():
        roof, rival = one["roofline"], peers.get(f"llama.cpp {PEERS[dtype]}")
        read = [p["prefill_tok_s"] for p in peers.values()]
        rows.append([
            f"assay {dtype}", one["prefill_tok_s"], one["decode_tok_s"], roof["decode_tok_s"], roof["decode_share"],
            one["decode_tok_s"] / rival["decode_tok_s"] if rival else None,
            one["prefill_tok_s"] / max(read) if read else None,
        ])  # fmt: skip
    rows += [[name, p["prefill_tok_s"], p["decode_tok_s"], None, None, None, None] for name, p in peers.items()]
    head = ["", "prefill tok/s", "decode tok/s", "decode's floor", "share", "over llama.cpp", "prefill over the best"]
    text += table(head, rows) + "\n"
    for dtype, one in found["assay"].items():
        text += f"\nWhere the time of assay in {dtype} went (the largest):\n\n{told_profile(one['profile'])}\n"
    return text + "".join(f"\n{name} is missing: {why}\n" for name, why in found["missing"].items())


def told_profile(rows: Sequence[Mapping[str, Any]]) -> str:
    kept = [row for row in rows if row["share"] >= 0.03]
    cells = [[r["phase"], r["kernel"], r["where"], r["calls"], r["ms"], f"{100 * r['share']:.0f} %"] for r in kept]
    return table(["phase", "kernel", "where", "calls", "ms a step", "share"], cells)


def told_families(found: Mapping[str, Any]) -> str:
    keys = [f"{who}_{what}_tok_s" for what in ("prefill", "decode") for who in ("assay", "transformers")]
    rows = [
        [f"{r['family']}, {r['dtype']}", f"{r['params'] / 1e6:.1f} M", *(r[k] for k in keys), r["prefill_ratio"],
         r["decode_ratio"], f"{r['difference']:.0e}"]
        for r in found["rows"]
    ]  # fmt: skip
    head = [
        "",
        "params",
        "prefill",
        "transformers",
        "decode",
        "transformers",
        "prefill ratio",
        "decode ratio",
        "differ",
    ]
    return table(head, rows) + "\n"


def told_contexts(found: Mapping[str, Any]) -> str:
    rows = []
    for name, times in found["seconds"].items():
        read, took = found["state_bytes_read"][name], times[-1] - times[0]
        rate = (read[-1] - read[0]) / took / 1e9 if read[-1] > read[0] and took > 0 else None
        rows.append([name, *(1e3 * t for t in times), *(n / 1e6 for n in (read[0], read[-1])), rate])
    first, last = found["contexts"][0], found["contexts"][-1]
    heads = [f"ms at {n:,}" for n in found["contexts"]]
    return table(["", *heads, f"state, MB at {first:,}", f"MB at {last:,}", "more state, GB/s"], rows) + "\n"


def told_training(found: Mapping[str, Any]) -> str:
    rows = [
        [r["model"], r["assay_tok_s"], r["plain_tok_s"], r["ratio"], r["assay_mfu"], r["plain_mfu"], r["spread"]]
        for r in found["rows"]
    ]
    return table(["", "assay tok/s", "plain GPT tok/s", "ratio", "assay MFU", "plain MFU", "spread"], rows) + "\n"


def told_serving(found: Mapping[str, Any]) -> str:
    base = found["subjects"]
    rows = [[n, r["output_tok_s"], r["ttft_s_p50"], r["itl_ms_p50"], min(r["rounds_tok_s"])] for n, r in base.items()]
    text = table(["", "tok/s", "TTFT p50 s", "ITL p50 ms", "the slowest round"], rows) + "\n"
    return text + "".join(f"\n{name} is missing: {why}\n" for name, why in found["missing"].items())


TITLES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "single": (f"One sequence: SmolLM2-135M, a prompt of {PROMPT} and {NEW} new tokens", told_single),
    "serve": ("Sixteen requests at once", told_serving),
    "families": ("Families beside transformers: 6 layers of 512, one sequence", told_families),
    "contexts": ("A decoded token against the context, 4 layers of 384, float32", told_contexts),
    "training": ("Training beside a plain PyTorch GPT, float32", told_training),
}


def page(out: Path, serve: Path | None) -> str:
    text = (
        "# Performance\n\nWritten by `python benchmarks/performance.py` (`make bench`): medians, programs in turns.\n"
    )
    files = {name: out / f"{name}.json" for name in TITLES} | ({"serve": serve} if serve is not None else {})
    for name, (title, told) in TITLES.items():
        if files[name].is_file():
            found = json.loads(files[name].read_text("utf-8"))
            machine = found["machine"]
            about = f"{machine['cpu']}, {found['threads']} threads, torch {machine['torch']}"
            text += f"\n## {title}\n\n{about}.\n\n{told(found)}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/bench-serve/smollm2"))
    parser.add_argument("--llama", type=Path, default=Path("."), help="the folder of llama-bench")
    parser.add_argument("--serve", type=Path, help="serve.json of benchmarks/serve.py")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/performance"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    for name in filter(None, given.sections.split(",")):
        if name not in SECTIONS:
            parser.error(f"--sections: {name!r}; accepted: {', '.join(SECTIONS)}")
        found = {"machine": environment(), "threads": given.threads, **SECTIONS[name](given)}
        (given.out / f"{name}.json").write_text(json.dumps(found) + "\n", "utf-8")
    PAGE.write_text(page(given.out, given.serve), "utf-8")


if __name__ == "__main__":
    main()

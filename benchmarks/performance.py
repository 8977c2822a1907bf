"""docs/PERFORMANCE.md: what this machine allows, what assay reaches, and its peers in the same run.

    python benchmarks/performance.py [--sections serve,single,quality,families,contexts,training] [--checkpoint FOLDER]
        [--llama FOLDER] [--threads N] [--rounds 2] [--out runs/performance]

A section measures and writes `SECTION.json` to the folder; the page is made of all that are there (benchmarks/page.py),
and --sections "" only writes it. Without a checkpoint the first section fetches SmolLM2 by pip. llama.cpp is its
`llama-bench` and `llama-server` in the folder --llama; what is not found is named on the page. A quarter of an hour on
two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from page import NEW, PEERS, PROMPT, SHORT, page

from assay.cost.bill import Question, bill
from assay.measure.machine import best, environment, matmul_flop_s, memory_byte_s
from assay.ops.linear import linear
from assay.spec.load import load_model
from assay.train.checkpoint import load_checkpoint

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/PERFORMANCE.md"
SERVED = Path("runs/bench-serve")
CPU = torch.device("cpu")
ROWS = 8
"""Of 512 tokens, whose loss is compared."""


def bench(given: argparse.Namespace, dtype: str, prompt: int, new: int, *more: str) -> dict[str, Any]:
    """`assay bench --json` in a process of its own."""
    size = ("--prompt-len", str(prompt), "--new-tokens", str(new), "--dtype", dtype, "--threads", str(given.threads))
    command = [sys.executable, "-m", "assay", "bench", str(given.checkpoint), *size, "--json", *more]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def single(given: argparse.Namespace) -> dict[str, Any]:
    """One sequence of SmolLM2: reading and decoding, and which kernels took the time."""
    found: dict[str, Any] = {"assay": {}, "peers": {}, "missing": {}, "short": {}}
    for number in range(given.rounds):
        profile = ("--profile",) if number == given.rounds - 1 else ()
        for dtype, theirs in PEERS.items():
            told = bench(given, dtype, PROMPT, NEW, "--seconds", "3", *profile)
            found["assay"].setdefault(dtype, []).append(told)
            rivals: dict[str, Callable[..., Any]] = {"llama.cpp": llama}
            rivals |= {"transformers": transformers} if dtype in ("f32", "bf16") else {}
            for name, peer in rivals.items():
                told = guarded(found["missing"], name, peer, given, theirs)
                if told is not None:
                    found["peers"].setdefault(f"{name} {theirs}", []).append(told)
    found["short"] = {dtype: bench(given, dtype, SHORT, 16, "--seconds", "2", "--profile") for dtype in PEERS}
    found["short_flops"] = bill(load_model(str(given.checkpoint)), Question(SHORT)).flops["prefill"]
    return {"floors": floors(given.checkpoint), **found}


def guarded(missing: dict[str, str], name: str, call: Callable[..., Any], *args: Any) -> Any:
    """What the peer measured; None, and why, where it is not there."""
    try:
        return call(*args)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        missing[name] = str(error)
        return None


@torch.inference_mode()
def floors(checkpoint: Path) -> dict[str, Any]:
    """GFLOP/s, and GB/s of torch's own reading, of a plain read of the model's matrices in bfloat16, and of their
    products with a row."""
    from native import every, reader

    kinds = {"f32": torch.float32, "bf16": torch.bfloat16}
    model = load_checkpoint(checkpoint)[0].to(torch.bfloat16)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    size, read = sum(2 * p.numel() for p in matrices), reader()
    rows = {w.shape[1]: torch.randn(1, w.shape[1]).bfloat16() for w in matrices}

    def multiplied() -> None:
        for w in matrices:
            linear(rows[w.shape[1]], w)

    return {
        "memory_gb_s": memory_byte_s(size, CPU) / 1e9,
        "streamed_gb_s": size / best(lambda: every(read, matrices), CPU, 1.0) / 1e9,
        "multiplied_gb_s": size / best(multiplied, CPU, 1.0) / 1e9,
        "matmul_gflop_s": {name: matmul_flop_s(dtype) / 1e9 for name, dtype in kinds.items()},
    }


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
    hf.utils.logging.disable_progress_bar()
    model = hf.AutoModelForCausalLM.from_pretrained(export(given, "hf", "f32"), dtype=kind).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    reads, gaps = [], []
    for _ in range(3):
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        reads.append(time.perf_counter() - start)
        for _ in range(NEW // 4):
            start = time.perf_counter()
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            gaps.append(time.perf_counter() - start)
    return {"prefill_tok_s": PROMPT / median(reads), "decode_tok_s": 1 / median(gaps)}


def serve(given: argparse.Namespace) -> dict[str, Any]:
    """benchmarks/serve.py, which fetches the checkpoint where there is none."""
    more = ["--checkpoint", str(given.checkpoint)] if given.checkpoint.is_dir() else []
    told = ["--dtypes", "bf16", "--rounds", str(given.rounds), "--threads", str(given.threads)]
    program = shutil.which("llama-server", path=str(given.llama)) or "llama-server"
    command = [sys.executable, str(HERE / "serve.py"), *more, *told, "--llama", program, "--out", str(SERVED)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads((SERVED / "serve.json").read_text("utf-8"))
    return found


def quality(given: argparse.Namespace) -> dict[str, Any]:
    from quality import measured

    return measured(given.checkpoint, ROWS)


def families(given: argparse.Namespace) -> dict[str, Any]:
    from families import DTYPES, FAMILIES, measured

    return {"rows": list(measured(list(FAMILIES), list(DTYPES), given.rounds))}


def training(given: argparse.Namespace) -> dict[str, Any]:
    from plain import SIZES, beside, precisions

    return {"rows": [beside(*size, given.rounds, dtype) for size in SIZES.values() for dtype in precisions()]}


def contexts(given: argparse.Namespace) -> dict[str, Any]:
    from contexts import measured

    return measured((256, 1024, 4096))


SECTIONS: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "serve": serve, "single": single, "quality": quality, "families": families, "contexts": contexts,
    "training": training,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--checkpoint", type=Path, default=SERVED / "smollm2")
    parser.add_argument("--llama", type=Path, default=Path("."), help="the folder of llama-bench and llama-server")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/performance"))
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    names = [name for name in given.sections.split(",") if name]
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--sections: {', '.join(sorted(unknown))}; accepted: {', '.join(SECTIONS)}")
    failed = [name for name in names if not done(name, given)]
    given.page.write_text(page(given.out), "utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def done(name: str, given: argparse.Namespace) -> bool:
    """Measures a section and writes what it found. One that fails is told, and leaves what was there."""
    start = time.perf_counter()
    try:
        found = {"machine": environment(), "threads": given.threads, **SECTIONS[name](given)}
    except Exception:
        traceback.print_exc()
        return False
    found["took_s"] = time.perf_counter() - start
    (given.out / f"{name}.json").write_text(json.dumps(found) + "\n", "utf-8")
    print(f"{name}: {found['took_s']:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    main()

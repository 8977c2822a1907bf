"""docs/PERFORMANCE.md, of what benchmarks/performance.py measured: tables, and the ratios that were wanted of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from families import WANTED as FAMILIES_WANTED

PROMPT, NEW, SHORT = 512, 64, 32
PEERS = {"f32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
"""Weights of as many bits, as llama.cpp's files have them."""
TIMES = {"bf16": 1.1, "int8": 1.5, "int4": 1.5}
"""Times llama.cpp's decoding that were wanted."""
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """A ratio and its bar, a least one or, where not `least`, a greatest."""

    what: str
    value: float
    bar: float
    least: bool = True

    @property
    def reached(self) -> bool:
        return self.value >= self.bar if self.least else self.value <= self.bar


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def told(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "" if value is None else str(value)

    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(map(told, row))} |" for row in rows)])


def middle(rounds: Sequence[Found], key: str) -> float:
    return median(one[key] for one in rounds)


def spread(rounds: Sequence[Found], key: str) -> float:
    """Of the repetitions: the greatest less the least, over the median."""
    values = [one[key] for one in rounds]
    return (max(values) - min(values)) / median(values)


def spreads(rounds: Sequence[Found]) -> str:
    return " / ".join(f"{100 * spread(rounds, key):.0f} %" for key in ("prefill_tok_s", "decode_tok_s"))


def single_rates(found: Found) -> Iterator[tuple[str, float, float, float | None, float | None]]:
    """Of each dtype the rates, times llama.cpp's decoding, and times the best peer's prefill."""
    peers = found["peers"]
    best = max((middle(rounds, "prefill_tok_s") for rounds in peers.values()), default=None)
    for dtype, rounds in found["assay"].items():
        prefill, decode = (middle(rounds, key) for key in ("prefill_tok_s", "decode_tok_s"))
        rival = peers.get(f"llama.cpp {PEERS[dtype]}")
        yield (
            dtype, prefill, decode, decode / middle(rival, "decode_tok_s") if rival else None,
            None if best is None else prefill / best,
        )  # fmt: skip


def arithmetic(found: Found, dtype: str) -> float:
    """Seconds of the short prompt's products at the rate of float32, or of bfloat16 where that is the faster one."""
    rates = found["floors"]["matmul_gflop_s"]
    return float(found["short_flops"]) / (1e9 * float(rates["f32"] if dtype == "f32" else max(rates.values())))


def told_single(found: Found) -> str:
    floors = found["floors"]
    rates = ", ".join(f"2048 in {name} make {rate:,.0f} GFLOP/s" for name, rate in floors["matmul_gflop_s"].items())
    text = f"Memory is read at {floors['memory_gb_s']:.1f} GB/s by torch in pieces as large as the weights, "
    text += f"{floors['streamed_gb_s']:.1f} by a plain read of the model's own matrices in bfloat16, "
    text += f"{floors['multiplied_gb_s']:.1f} by their products with one row; products of {rates}.\n\n"
    rows = []
    for dtype, prefill, decode, times, over in single_rates(found):
        rounds = found["assay"][dtype]
        roof = rounds[-1]["roofline"]
        share = decode / roof["decode_tok_s"]
        rows.append([
            f"assay {dtype}", prefill, decode, roof["decode_tok_s"], share, times, over, spreads(rounds),
        ])  # fmt: skip
    for name, rounds in found["peers"].items():
        prefill, decode = (middle(rounds, key) for key in ("prefill_tok_s", "decode_tok_s"))
        rows.append([name, prefill, decode, None, None, None, None, spreads(rounds)])
    head = ["", "prefill tok/s", "decode tok/s", "decode's floor", "share", "over llama.cpp", "prefill over the best"]
    text += table([*head, "spread"], rows) + f"\n\nThe first token of a prompt of {SHORT}, beside 1.5 times the median "
    text += "decode step of the same run and the arithmetic (at bfloat16's rate but for f32, where it is faster):\n\n"
    text += told_first(found)
    for dtype, rounds in found["assay"].items():
        text += f"\nWhere the time of assay in {dtype} went (the largest):\n\n{told_profile(rounds[-1]['profile'])}\n"
    return text


def told_first(found: Found) -> str:
    rows = [
        [dtype, 1e3 * one["ttft_s"], one["itl_ms_p50"], 1e3 * made, 1.5 * one["itl_ms_p50"] + 1e3 * made]
        for dtype, one in found["short"].items()
        for made in (arithmetic(found, dtype),)
    ]
    text = table(["", "TTFT ms", "a decode step ms", "arithmetic ms", "allowed ms"], rows) + "\n"
    for dtype, one in found["short"].items():
        read = [row for row in one["profile"] if row["phase"] == "prefill"]
        text += f"\nWhere the time of a prompt of {SHORT} in {dtype} went (the largest):\n\n{told_profile(read)}\n"
    return text


def wanted_single(found: Found) -> Iterator[Wanted]:
    for dtype, _, _, times, over in single_rates(found):
        if times is not None and dtype in TIMES:
            yield Wanted(f"decode in {dtype} over llama.cpp's {PEERS[dtype]}", times, TIMES[dtype])
        if over is not None:
            yield Wanted(f"prefill in {dtype} over the best of the peers", over, 1.3)
    for dtype, one in found["short"].items():
        allowed = 1.5e-3 * one["itl_ms_p50"] + arithmetic(found, dtype)
        yield Wanted(f"first token of {SHORT} in {dtype} over what is allowed", one["ttft_s"] / allowed, 1.0, False)


def told_profile(rows: Sequence[Found]) -> str:
    kept = [row for row in rows if row["share"] >= 0.03]
    cells = [[r["phase"], r["kernel"], r["where"], r["calls"], r["ms"], f"{100 * r['share']:.0f} %"] for r in kept]
    return table(["phase", "kernel", "where", "calls", "ms a step", "share"], cells)


def told_quality(found: Found) -> str:
    loss = found["loss_nats"]
    rows = [[name, f"{nats:.4f}", f"{nats - loss['f32']:+.4f}"] for name, nats in loss.items()]
    text = table(["", "nats a token", "over f32"], rows)
    return (
        f"{found['tokens']:,} tokens, rows of 512, weights as `--dtype` holds them, or rounded as gguf's.\n\n{text}\n"
    )


def wanted_quality(found: Found) -> Iterator[Wanted]:
    loss = found["loss_nats"]
    for ours, theirs in (("int8", "Q8_0"), ("int4", "Q4_0")):
        yield Wanted(f"loss in {ours} over {theirs}'s, nats a token", loss[ours] - loss[theirs], 0.02, False)


def told_families(found: Found) -> str:
    keys = [f"{who}_{what}_tok_s" for what in ("prefill", "decode") for who in ("assay", "transformers")]
    rows = [
        [f"{r['family']}, {r['dtype']}", f"{r['params'] / 1e6:.1f} M", *(r[k] for k in keys), r["prefill_ratio"],
         r["decode_ratio"], f"{r['difference']:.0e}"]
        for r in found["rows"]
    ]  # fmt: skip
    who = ["prefill", "transformers", "decode", "transformers", "prefill ratio", "decode ratio"]
    text = table(["", "params", *who, "differ"], rows) + "\n"
    for row in found["rows"]:
        if row["profile"]:
            name = f"{row['family']} in {row['dtype']}"
            text += f"\nWhere the time of reading went for {name} (the largest):\n\n{told_profile(row['profile'])}\n"
    return text


def wanted_families(found: Found) -> Iterator[Wanted]:
    for what, bar in FAMILIES_WANTED.items():
        for row in found["rows"]:
            yield Wanted(f"{what} of {row['family']} in {row['dtype']} over transformers", row[f"{what}_ratio"], bar)


def told_contexts(found: Found) -> str:
    rows = []
    for name, times in found["seconds"].items():
        read, took = found["state_bytes_read"][name], times[-1] - times[0]
        rate = (read[-1] - read[0]) / took / 1e9 if read[-1] > read[0] and took > 0 else None
        rows.append([name, *(1e3 * t for t in times), *(n / 1e6 for n in (read[0], read[-1])), rate])
    first, last = found["contexts"][0], found["contexts"][-1]
    heads = [f"ms at {n:,}" for n in found["contexts"]]
    return table(["", *heads, f"state, MB at {first:,}", f"MB at {last:,}", "more state, GB/s"], rows) + "\n"


def told_training(found: Found) -> str:
    keys = ("model", "assay_tok_s", "plain_tok_s", "ratio", "assay_mfu", "plain_mfu", "spread")
    head = ["", "assay tok/s", "plain GPT tok/s", "ratio", "assay MFU", "plain MFU", "spread"]
    text = table(head, [[row[key] for key in keys] for row in found["rows"]]) + "\n\n"
    best = max(1.4 * row["plain_mfu"] for row in found["rows"])
    text += f"1.4 times the plain GPT would be an MFU of up to {best:.2f}.\n"
    for row in found["rows"]:
        text += f"\nWhere the time of a step of {row['model']} went (the largest):\n\n{told_profile(row['profile'])}\n"
    return text


def wanted_training(found: Found) -> Iterator[Wanted]:
    for row in found["rows"]:
        yield Wanted(f"MFU of {row['model']}", row["assay_mfu"], 0.7)
        yield Wanted(f"training {row['model']} over a plain GPT", row["ratio"], 1.4)


def told_serve(found: Found) -> str:
    base = found["subjects"]
    rows = [[n, r["output_tok_s"], r["ttft_s_p50"], r["itl_ms_p50"], min(r["rounds_tok_s"])] for n, r in base.items()]
    text = table(["", "tok/s", "TTFT p50 s", "ITL p50 ms", "the slowest round"], rows) + "\n"
    for name, shares in found["overhead"].items():
        text += f"\nOf the engine's steps in {name}: "
        text += ", ".join(f"{key} {100 * share:.1f} %" for key, share in shares.items()) + ".\n"
    return text


def wanted_serve(found: Found) -> Iterator[Wanted]:
    rate = {name: row["output_tok_s"] for name, row in found["subjects"].items()}
    for peer, bar in (("transformers", 8.0), ("llama.cpp server", 2.0)):
        if f"{peer}, bf16" in rate:
            yield Wanted(f"sixteen requests over {peer}", rate["assay engine, bf16"] / rate[f"{peer}, bf16"], bar)


def none(_: Found) -> Iterator[Wanted]:
    yield from ()


@dataclass(frozen=True)
class Section:
    title: str
    command: str
    told: Callable[[Found], str]
    wanted: Callable[[Found], Iterator[Wanted]] = none


SINGLE = f"assay bench CHECKPOINT --dtype DTYPE --prompt-len {PROMPT} --new-tokens {NEW} --profile"
SECTIONS: Mapping[str, Section] = {
    "single": Section(
        f"One sequence: SmolLM2-135M, a prompt of {PROMPT} and {NEW} new tokens", SINGLE, told_single, wanted_single
    ),
    "quality": Section(
        "What 8 and 4 bits cost: SmolLM2-135M on the default corpus", "python benchmarks/quality.py CHECKPOINT",
        told_quality, wanted_quality,
    ),
    "serve": Section(
        "Sixteen requests at once", "python benchmarks/serve.py --dtypes bf16", told_serve, wanted_serve
    ),
    "families": Section(
        "Families beside transformers: 6 layers of 512, one sequence", "python benchmarks/families.py",
        told_families, wanted_families,
    ),
    "contexts": Section(
        "A decoded token against the context, 4 layers of 384, float32", "python benchmarks/contexts.py", told_contexts
    ),
    "training": Section(
        "Training beside a plain PyTorch GPT (in bfloat16 under autocast)", "python benchmarks/plain.py",
        told_training, wanted_training,
    ),
}  # fmt: skip


def page(out: Path) -> str:
    """Of all sections that were measured into the folder."""
    files = {name: out / f"{name}.json" for name in SECTIONS}
    measured = {name: json.loads(file.read_text("utf-8")) for name, file in files.items() if file.is_file()}
    text = "# Performance\n\nWritten by `python benchmarks/performance.py` (`make bench`): medians, programs in turns; "
    text += "spread is the greatest less the least repetition over the median (prefill / decode).\n"
    wanted = [one for name, found in measured.items() for one in SECTIONS[name].wanted(found)]
    reached = sum(one.reached for one in wanted)
    text += f"\n## Ratios that were wanted: {reached} of {len(wanted)} reached\n\n"
    bars = [[w.what, w.value, f"{'≥' if w.least else '≤'} {w.bar}", "yes" if w.reached else "no"] for w in wanted]
    text += table(["", "found", "wanted", "reached"], bars) + "\n"
    for name, found in measured.items():
        machine, missing = found["machine"], found.get("missing", {})
        about = f"{machine['cpu']}, {found['threads']} threads, torch {machine['torch']}"
        text += f"\n## {SECTIONS[name].title}\n\n{about}. `{SECTIONS[name].command}`\n\n{SECTIONS[name].told(found)}"
        text += "".join(f"\n{who} is missing: {why}\n" for who, why in missing.items())
    return text

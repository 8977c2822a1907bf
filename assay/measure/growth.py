"""What reading a context and decoding after it cost, against its length: seconds, bytes held, FLOPs, and exponents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from assay.cache import Cache, Size
from assay.cost.bill import Question, Sheet
from assay.engine.runner import CHUNK, Runner
from assay.measure.decode_fit import Step
from assay.measure.kernels import Held
from assay.measure.machine import nbytes
from assay.measure.memory import predicted
from assay.measure.serving import Load, Serving, in_turns
from assay.measure.subject import Subject
from assay.model.lm import LM, state_table
from assay.spec.load import change

ALONE = True
SECONDS = 20.0  # what is watched, prompts that are read to decode after them, and the longest prefills
STATE = ("state_bytes_predicted", "state_bytes_measured")
PREFILL = ("prefill_s", "prefill_held_bytes", "prefill_flops", "prefill_mixer_flops", "prefill_executed_flops")
DECODE = ("decode_s", "decode_held_bytes", "decode_flops", "decode_mixer_flops", "decode_executed_flops")
COLUMNS = (*STATE, *PREFILL, *DECODE, "decode_tok_s")
Row = dict[str, Any]


def measure(
    subject: Subject,
    *,
    contexts: Sequence[int] = (128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    batches: Sequence[int] = (1, 8, 32),
    cached: int = 65536,
    root_stride: bool = False,
    seconds: float = 10.0,
) -> list[Row]:
    """Rows: batch, context, state_bytes_predicted, state_bytes_measured, decode_tok_s, and for `prefill` and `decode`
    each _s, _held_bytes, _flops, _mixer_flops, _executed_flops; then two rows of exponents, see `exponents`.

    decode: one step that gives every sequence of the batch its token number `context`, greedy sampling included.
    prefill: reading `context` tokens as the engine does, in chunks of 512; of the first batch alone, null for others.
    Cells of more than `cached` tokens in all are left out. _s: medians; cells take turns, three prefills and twelve
    steps each or more. seconds: of all timing, but for that least.

    _held_bytes: state_bytes_measured, and the most that the tensors of the step hold at once, weights not counted
    (what happens inside one torch operator is not seen). _flops: what the mathematics needs, by the bill;
    _mixer_flops: what the mixers need of that beside their linear maps; _executed_flops: what torch's counter counts,
    which sees products and convolutions and nothing elementwise.

    root_stride: mixers that see with a stride have it, and the window before it, at the root of each context (Child et
    al. 2019, arXiv 1904.10509, section 4.2: a stride near the root makes the pairs grow as N sqrt N).
    """
    check(contexts, batches, cached, seconds)
    lengths = sorted(set(contexts))
    models = {n: frozen(subject, n if root_stride else None) for n in lengths}
    refused = {n: reason for n in lengths if (reason := subject.refusal(n)) is not None}
    rows: list[Row] = []
    for place, batch in enumerate(dict.fromkeys(batches)):
        cells = [Cell(models[n], batch, n) for n in lengths if n not in refused and batch * n <= cached]
        found: list[Row] = [{"batch": batch, "context": cell.context} | cell.stored for cell in cells]
        if place == 0:
            add(found, PREFILL, prefills(cells, seconds / 2))
        add(found, (*DECODE, "decode_tok_s"), decodes(cells, seconds / 2 / len(set(batches))))
        blank = dict.fromkeys(COLUMNS)
        rows += [{"batch": batch, "context": row["context"]} | blank | row for row in found]
        rows += [{"batch": batch, "context": n} | blank | {"reason": reason} for n, reason in refused.items()]
    return rows + exponents([row for row in rows if row["batch"] == batches[0] and "reason" not in row])


def check(contexts: Sequence[int], batches: Sequence[int], cached: int, seconds: float) -> None:
    for name, values, least, count in (("contexts", contexts, 2, 2), ("batches", batches, 1, 1)):
        if len(set(values)) < count or min(values) < least:
            raise ValueError(f"growth: {name}: {list(values)}; accepted: {count} or more, each {least} or more")
    if min(contexts) * batches[0] > cached:
        raise ValueError(f"growth: cached: {cached}; accepted: {min(contexts) * batches[0]} or more, the first cell")
    if seconds <= 0:
        raise ValueError(f"growth: seconds: {seconds}; accepted: above 0")


def frozen(subject: Subject, context: int | None) -> LM:
    """The same weights without gradients, which torch's counter would follow; with a context, every stride and the
    window before it are at its root."""
    sees = {name: getattr(block.mixer, "sees", None) for name, block in subject.spec.blocks.items()}
    strided = [name for name, rule in sees.items() if context is not None and rule is not None and rule.stride]
    root = max(2, round(math.sqrt(context or 0)))
    changes = {f"blocks.{name}.mixer.sees.{key}": root for name in strided for key in ("window", "stride")}
    return subject.variant(change(subject.spec, changes)).model.requires_grad_(False)


def add(rows: list[Row], names: Sequence[str], values: Sequence[tuple[float, ...]]) -> None:
    for row, found in zip(rows, values, strict=True):
        row |= dict(zip(names, found, strict=True))


@dataclass(frozen=True)
class Cell:
    """A model that reads `context` tokens of each of `batch` sequences."""

    model: LM
    batch: int
    context: int

    @cached_property
    def stored(self) -> Row:
        """State by the bill, and of the tensors of a cache without headroom."""
        weight = next(self.model.parameters())
        cache = Cache(state_table(self.model.spec), Size(self.batch, self.context), weight.dtype, weight.device)
        held = sum(nbytes(tensor) for _, tensor in cache.tensors())
        return dict(zip(STATE, (predicted(self.model, self.batch, self.context), held), strict=True))

    def needed(self, phase: str) -> tuple[int, int]:
        """FLOPs by the bill: of the model, and of its mixers without their linear maps."""
        sheet, reads = Sheet(self.model.spec), phase == "prefill"
        new, seen = (self.context, 0) if reads else (1, self.context - 1)
        whole = sheet.bill(Question(self.context)).flops["prefill" if reads else "decode_per_token"]
        mixers = [placed for placed in sheet.parts if placed.part.slot == "mixers"]
        return self.batch * whole, self.batch * sum(m.part.cost(m.site, new, seen).flops for m in mixers)

    def counted(self, phase: str, seconds: float, run: Callable[[], object]) -> tuple[float, ...]:
        """The columns of a phase. run: it once more, to be watched."""
        with Held() as held, FlopCounterMode(display=False) as counter:
            run()
        whole, mixers = self.needed(phase)
        kept = self.stored["state_bytes_measured"]
        return seconds, kept + held.peak, whole, mixers, counter.get_total_flops()


def prefills(cells: Sequence[Cell], budget_s: float) -> list[tuple[float, ...]]:
    """PREFILL of each cell."""
    loads = [Serving(cell.model, Load(cell.batch, cell.context, 1)) for cell in cells]
    watched = [cell.counted("prefill", 0.0, reading(cell, load)) for cell, load in zip(cells, loads, strict=True)]
    found = in_turns([load.prefill for load in loads], budget_s)
    times = [median(read for read, _ in reads) for reads in found]
    return [(seconds, *rest) for seconds, (_, *rest) in zip(times, watched, strict=True)]


def reading(cell: Cell, load: Serving) -> Callable[[], object]:
    """The prefill without the cache's own making."""
    runner = Runner(cell.model, Size(cell.batch, cell.context, min(CHUNK, cell.context)))
    slots = [runner.open(cell.context) for _ in range(cell.batch)]
    return lambda: runner.feed(slots, load.ids.tolist())


def decodes(cells: Sequence[Cell], budget_s: float) -> list[tuple[float, ...]]:
    """DECODE and tokens a second of each cell; their caches exist at once."""
    steps = [Step(cell.model, cell.batch, cell.context) for cell in cells]
    times = [median(found) for found in in_turns([step.burst for step in steps], budget_s)]
    return [
        (*cell.counted("decode", seconds, step.seconds), cell.batch / seconds)
        for cell, step, seconds in zip(cells, steps, times, strict=True)
    ]


def exponents(rows: Sequence[Row]) -> list[Row]:
    """A row a phase: p of c * context^p by least squares on logarithms, over the upper half of the contexts, which
    begins at `from_context`: seconds_slope, held_bytes_slope, flops_slope, mixer_flops_slope, executed_flops_slope.

    seconds_low_slope, seconds_high_slope: the 95 % interval, Student's t on the residuals, which hold noise and
    curvature alike; null for fewer than three contexts. mixer_flops_slope is what theory says of the mixers: 2 (all
    pairs), 1.5 (root_stride) or 1 for prefill; 1, 0.5 or 0 for decoding. flops_slope has the linear maps besides.
    """
    upper = rows[len(rows) // 2 :] if len(rows) > 3 else rows
    batch, first = (rows[0]["batch"], upper[0]["context"]) if rows else (None, None)
    found = []
    for phase, columns in (("prefill", PREFILL), ("decode", DECODE)):
        row: Row = {"batch": batch, "context": None} | dict.fromkeys(COLUMNS) | {"phase": phase, "from_context": first}
        for column in columns:
            name = "seconds" if column.endswith("_s") else column.removeprefix(f"{phase}_")
            middle, low, high = slope([r["context"] for r in upper], [r[column] for r in upper])
            row[f"{name}_slope"] = middle
            row |= {"seconds_low_slope": low, "seconds_high_slope": high} if name == "seconds" else {}
        found.append(row)
    return found


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The exponent and the ends of its interval; null where they are not determined."""
    if len(x) < 2 or min(y) <= 0:
        return None, None, None
    fit = stats.linregress(np.log(x), np.log(y))
    if len(x) < 3:
        return float(fit.slope), None, None
    half = float(stats.t.ppf(0.975, len(x) - 2)) * float(fit.stderr)
    return float(fit.slope), float(fit.slope) - half, float(fit.slope) + half

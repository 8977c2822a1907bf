"""State bytes, predicted from the spec and measured on the tensors, and the peak memory of the process."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from assay.cache import Size
from assay.cost.bill import DTYPES, Question, bill
from assay.engine.runner import Runner
from assay.measure.machine import nbytes
from assay.measure.subject import Subject
from assay.model.lm import LM, state_table
from assay.ops.heap import give_back

SECONDS = 0.1
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FILLED = 256


def measure(
    subject: Subject, *, batches: Sequence[int] = (1, 8), contexts: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Rows: batch, context, state_bytes_predicted, state_bytes_measured, peak_memory_bytes, peak_of.

    predicted: the bill's. measured: the tensors of a cache without headroom, with `context` tokens (windows: up to 256)
    fed to each of its sequences. peak: the largest resident size of this process, the interpreter and torch included;
    peak_of says whether since its row began (`row`) or, where the system allows no fresh start, ever (`process`).
    """
    rows = []
    for batch in batches:
        for context in contexts if contexts is not None else (subject.length // 2, subject.length):
            row: dict[str, Any] = {"batch": batch, "context": context}
            reason = subject.refusal(context)
            if reason is not None:
                names = ("state_bytes_predicted", "state_bytes_measured", "peak_memory_bytes")
                rows.append(row | dict.fromkeys(names) | {"reason": reason})
                continue
            fresh = start_peak()
            row["state_bytes_predicted"] = predicted(subject.model, batch, context)
            row["state_bytes_measured"] = measured(subject.model, batch, context)
            rows.append(row | {"peak_memory_bytes": peak_bytes(), "peak_of": "row" if fresh else "process"})
    return rows


def predicted(model: LM, batch: int, context: int) -> int:
    """By `assay.cost.bill`, in the dtype of the model's weights."""
    named = {f"torch.{value}": key for key, value in DTYPES.items()}
    dtype = named.get(str(next(model.parameters()).dtype))
    if dtype is None:
        raise ValueError(f"memory: weights in {next(model.parameters()).dtype}; accepted: {', '.join(named)}")
    return bill(model.spec, Question(context, batch, dtype, dtype)).state_bytes


@torch.inference_mode()
def measured(model: LM, batch: int, context: int) -> int:
    """Bytes of the cache's tensors. Windows are filled a token at a time, since more at once would need headroom, and
    only the first 256 of them: what is allocated does not change."""
    fields = [f for declared in state_table(model.spec).values() for f in declared]
    chunk = 1 if any(f.keep is not None for f in fields) else context
    runner = Runner(model, Size(batch, context, chunk))
    slots = [runner.open(context) for _ in range(batch)]
    runner.feed(slots, [[0] * (context if chunk > 1 else min(context, FILLED))] * batch)
    return sum(nbytes(tensor) for _, tensor in runner.cache.tensors())


def start_peak() -> bool:
    """Forget the peak so far, and what was freed of it; False where the system does not offer that."""
    give_back()  # malloc keeps what is freed, and the next peak would begin with it
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """The largest resident size of this process."""
    lines = STATUS.read_text("ascii").splitlines() if STATUS.is_file() else []
    held = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    if held is not None:
        return held
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

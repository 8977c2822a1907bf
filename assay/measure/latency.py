"""Prefill and decode speed by batch and context, with the cache and without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay.measure.serving import Load, Serving, roofline
from assay.measure.subject import Subject

CACHES = {"rows": True, "none": False, "True": True, "False": False}
NEW = 16
ALONE = True


def measure(
    subject: Subject,
    *,
    batches: Sequence[int] = (1, 8),
    contexts: Sequence[int] | None = None,
    cache: Sequence[str | bool] = ("rows", "none"),
    seconds: float = 1.5,
) -> list[dict[str, Any]]:
    """Rows: batch, context, cache, prefill_s, ttft_s, decode_tok_s, itl_ms_p50, itl_ms_p99, roofline_tok_s.

    cache: `rows` (or true), the engine's cache of a row a sequence; `none` (or false) reads everything again for every
    token. prefill_s reads `context` tokens, ttft_s chooses a token after them, decoding fills the last 16 places of
    the context (less where it is short). Medians; `seconds` is the time for all rows together. contexts: null is half
    the training length and the training length. roofline_tok_s is the speed at which weights and state arrive from
    memory, or the products are done, at the rates of this machine for their size.
    """
    if seconds <= 0:
        raise ValueError(f"latency: seconds: {seconds}; accepted: above 0")
    kinds = ["rows" if kept(name) else "none" for name in cache]
    wanted = contexts if contexts is not None else (subject.length // 2, subject.length)
    cells = [(b, c, kind) for b in batches for c in wanted for kind in kinds]
    return [cell(subject, *each, seconds / len(cells)) for each in cells]


def kept(name: str | bool) -> bool:
    if str(name) not in CACHES:
        raise ValueError(f"latency: cache: {name!r}; accepted: rows, none (or true, false)")
    return CACHES[str(name)]


def cell(subject: Subject, batch: int, context: int, cache: str, budget_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {"batch": batch, "context": context, "cache": cache}
    reason = subject.refusal(context)
    if reason is not None:
        names = ("prefill_s", "ttft_s", "decode_tok_s", "itl_ms_p50", "itl_ms_p99", "roofline_tok_s")
        return row | dict.fromkeys(names) | {"reason": reason}
    load = Load(batch, context, max(1, min(NEW, context // 2)), cache == "rows")
    times = Serving(subject.model, load).measure(budget_s)
    return row | {
        "prefill_s": times.prefill,
        "ttft_s": times.first,
        "decode_tok_s": batch / times.gap,
        "itl_ms_p50": 1e3 * times.gap,
        "itl_ms_p99": 1e3 * times.late(0.99),
        "roofline_tok_s": batch / roofline(subject.model, load).decode_s,
    }

"""Prefill and decode speed by batch and context, with the cache and without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay.measure.serving import Load, Serving, Times, roofline, timed
from assay.measure.subject import Subject

CACHES = {"rows": True, "none": False, "True": True, "False": False}
NEW = 16
ALONE = True
Cell = tuple[int, int, str]


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
    memory, or the products are done, at the rates of this machine for their size. The rows are timed in turns, so that
    they can be compared, each for the same time; their caches exist at once.
    """
    if seconds <= 0:
        raise ValueError(f"latency: seconds: {seconds}; accepted: above 0")
    kinds = ["rows" if kept(name) else "none" for name in cache]
    wanted = contexts if contexts is not None else (subject.length // 2, subject.length)
    cells = [(b, c, kind) for b in batches for c in wanted for kind in kinds]
    loads = {each: Serving(subject.model, load(*each)) for each in cells if subject.refusal(each[1]) is None}
    times = dict(zip(loads, timed(list(loads.values()), seconds), strict=True))
    return [row(subject, each, times.get(each)) for each in cells]


def kept(name: str | bool) -> bool:
    if str(name) not in CACHES:
        raise ValueError(f"latency: cache: {name!r}; accepted: rows, none (or true, false)")
    return CACHES[str(name)]


def load(batch: int, context: int, cache: str) -> Load:
    return Load(batch, context, max(1, min(NEW, context // 2)), cache == "rows")


def row(subject: Subject, cell: Cell, times: Times | None) -> dict[str, Any]:
    """times: None where the model refuses the length."""
    batch, context, cache = cell
    found: dict[str, Any] = {"batch": batch, "context": context, "cache": cache}
    if times is None:
        names = ("prefill_s", "ttft_s", "decode_tok_s", "itl_ms_p50", "itl_ms_p99", "roofline_tok_s")
        return found | dict.fromkeys(names) | {"reason": subject.refusal(context)}
    return found | {
        "prefill_s": times.prefill,
        "ttft_s": times.first,
        "decode_tok_s": batch / times.gap,
        "itl_ms_p50": 1e3 * times.gap,
        "itl_ms_p99": 1e3 * times.late(0.99),
        "roofline_tok_s": batch / roofline(subject.model, load(*cell)).decode_s,
    }

"""What the machine pays: latency, memory and kernels, against context, by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from assay.report.collect import Arm, Row, Stage, over_seeds
from assay.report.figures import Canvas, Plot, Style, arms_with, series
from assay.report.words import kind, label, number, unit

Styles = Mapping[str, Style]
NO_CACHE = "no cache"


def latency(stage: Stage, styles: Styles) -> list[Plot]:
    """Decode speed with its roofline, the gap between tokens, and prefill: each against context, a view a batch."""
    decode = Canvas("context (tokens)", "decode speed (tok/s)", True, True, x_kind="binary")
    gaps = Canvas("context (tokens)", "time between tokens (ms)", True, x_kind="binary")
    prefill = Canvas("context (tokens)", "prefill (s)", True, True, x_kind="binary", y_kind="seconds")
    for batch in _batches(stage, "latency"):
        for arm in arms_with(stage.arms, "latency"):
            rows = [_with_cache(row) for row in arm.rows["latency"] if row.get("batch") == batch]
            kept = [row["cache"] for row in rows if row["cache"] != NO_CACHE][:1]
            for named, style, group in series(arm, rows, "cache", styles[arm.name], plain=kept):
                _latency_lines((decode, gaps, prefill), named, style, group, f"batch {batch}")
    plots = [
        (decode, "Decode speed", "Dotted: the roofline, what memory bandwidth allows.", "xy"),
        (gaps, "Time between tokens", "Solid: median. Dashed: 99th percentile.", "xy"),
        (prefill, "Prefill time", "Reading the whole context before the first token.", "xy"),
    ]
    return [c.plot(title, note, toggles=toggles) for c, title, note, toggles in plots if c.traces]


def _latency_lines(
    canvases: tuple[Canvas, Canvas, Canvas], arm: Arm, style: Style, rows: Sequence[Row], view: str
) -> None:
    decode, gaps, prefill = canvases
    cache = str(rows[0]["cache"])
    hover = f"cache: {label(cache)}" if cache not in ("", NO_CACHE) else ""
    decode.line(arm, style, over_seeds(rows, "context", "decode_tok_s"), view, hover=hover)
    roof = {"dash": "dot", "width": 1.5, "symbol": "line-ew-open", "hover": "roofline"}
    decode.line(arm, style, over_seeds(rows, "context", "roofline_tok_s"), view, bars=False, **roof)
    gaps.line(
        arm, style, over_seeds(rows, "context", "itl_ms_p50"), view, dash="solid", hover=f"median {hover}".strip()
    )
    gaps.line(
        arm, style, over_seeds(rows, "context", "itl_ms_p99"), view, bars=False, dash="dash", hover="99th percentile"
    )
    prefill.line(arm, style, over_seeds(rows, "context", "prefill_s"), view, hover=hover)


def _with_cache(row: Row) -> dict[str, Any]:
    """The row with the name of its cache: speeds of two caches, or without one, do not average."""
    cache = str(row.get("cache") or "")
    return {**row, "cache": NO_CACHE if cache == "none" else cache}


def memory(stage: Stage, styles: Styles) -> list[Plot]:
    """State measured and predicted (they must agree), and the peak of the process."""
    canvas = Canvas("context (tokens)", "state (bytes)", True, True, x_kind="binary", y_kind="bytes")
    peak = Canvas("context (tokens)", "peak memory (bytes)", True, x_kind="binary", y_kind="bytes")
    for batch in _batches(stage, "memory"):
        for arm in arms_with(stage.arms, "memory"):
            rows = [row for row in arm.rows["memory"] if row.get("batch") == batch]
            view, style = f"batch {batch}", styles[arm.name]
            canvas.line(arm, style, over_seeds(rows, "context", "state_bytes_measured"), view, hover="measured")
            faint = {"dash": "dot", "width": 1.5, "symbol": "line-ew-open", "hover": "predicted"}
            canvas.line(arm, style, over_seeds(rows, "context", "state_bytes_predicted"), view, bars=False, **faint)
            peak.axes["y"] = {"rangemode": "tozero"}
            peak.line(arm, style, over_seeds(rows, "context", "peak_memory_bytes"), view)
    plots = []
    if canvas.traces:
        note = "Marks: measured. Dotted: predicted from the specification, before a tensor exists."
        plots.append(canvas.plot("State memory", note, toggles="xy"))
    if peak.traces:
        plots.append(peak.plot("Peak memory", "Weights, state and working space of the process.", toggles="xy"))
    return plots


def _batches(stage: Stage, what: str) -> list[Any]:
    found = {row.get("batch") for arm in stage.arms for row in arm.rows.get(what, ())}
    return sorted((b for b in found if number(b) is not None), key=lambda b: float(str(b)))


def kernels(stage: Stage, styles: Styles) -> list[Plot]:
    """Time and memory of each backend against length, a view for each pass: a colour an arm, a dash a backend."""
    quantities = (("time", "seconds"), ("peak memory", "peak_bytes"), ("memory traffic", "traffic_bytes"))
    arms, plots = arms_with(stage.arms, "kernels"), []
    for title, key in quantities:
        canvas = Canvas("length (tokens)", f"{title} ({unit(key)})", True, True, x_kind="binary", y_kind=kind(key))
        for arm in arms:
            rows = [row for row in arm.rows["kernels"] if number(row.get("length")) is not None]
            for named, style, group in series(arm, rows, "backend", styles[arm.name], alone=len(arms) == 1):
                for view, column in (("forward", key), ("forward and backward", f"train_{key}")):
                    canvas.line(named, style, over_seeds(group, "length", column), view)
        if canvas.traces:
            plots.append(canvas.plot(f"Kernels: {title}", "The same attention, by backend.", toggles="xy"))
    return plots

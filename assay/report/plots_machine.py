"""What the machine pays: latency, memory and kernels, against context, by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from assay.report.collect import Arm, Row, Stage, over_seeds
from assay.report.figures import DASHES, PALETTE, SYMBOLS, Canvas, Plot, Style, arms_with
from assay.report.words import label, number

Styles = Mapping[str, Style]


def latency(stage: Stage, styles: Styles) -> list[Plot]:
    """Decode speed with its roofline, the gap between tokens, and prefill: each against context, a view a batch."""
    decode = Canvas("context (tokens)", "decode speed (tok/s)", True, x_kind="binary")
    gaps = Canvas("context (tokens)", "time between tokens (ms)", True, x_kind="binary")
    prefill = Canvas("context (tokens)", "prefill (s)", True, True, x_kind="binary", y_kind="seconds")
    for batch in _batches(stage, "latency"):
        for arm in arms_with(stage.arms, "latency"):
            rows = [row for row in arm.rows["latency"] if row.get("batch") == batch]
            for cache, group in _by_cache(rows):
                _latency_lines((decode, gaps, prefill), arm, styles[arm.name], group, f"batch {batch}", cache)
    plots = [
        (decode, "Decode speed", "Dotted: the roofline, what memory bandwidth allows.", "xy"),
        (gaps, "Time between tokens", "Solid: median. Dashed: 99th percentile.", "xy"),
        (prefill, "Prefill time", "Reading the whole context before the first token.", "xy"),
    ]
    return [c.plot(title, note, toggles=toggles) for c, title, note, toggles in plots if c.traces]


def _latency_lines(
    canvases: tuple[Canvas, Canvas, Canvas], arm: Arm, style: Style, rows: Sequence[Row], view: str, cache: str
) -> None:
    decode, gaps, prefill = canvases
    hover = f"cache: {label(cache)}" if cache else ""
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


def _by_cache(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows apart by how the cache is stored: speeds of two caches do not average."""
    caches = list(dict.fromkeys(str(row.get("cache") or "") for row in rows))
    return [(cache, [row for row in rows if str(row.get("cache") or "") == cache]) for cache in caches]


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
    """Time and memory of each backend against length: a colour an arm, a dash a backend."""
    views = (("time", "seconds"), ("peak memory", "peak_bytes"), ("memory traffic", "traffic_bytes"))
    plots = []
    for title, key in views:
        kind = "seconds" if key == "seconds" else "bytes"
        canvas = Canvas("length (tokens)", title, True, True, x_kind="binary", y_kind=kind)
        many = len(arms_with(stage.arms, "kernels")) > 1
        for arm in arms_with(stage.arms, "kernels"):
            rows = arm.rows["kernels"]
            for place, backend in enumerate(dict.fromkeys(str(row.get("backend")) for row in rows)):
                points = over_seeds([r for r in rows if str(r.get("backend")) == backend], "length", key)
                named = Arm(backend, f"{arm.title}: {backend}" if many else backend, {}, False, None)
                style = (
                    styles[arm.name]
                    if many
                    else Style(PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)], "solid")
                )
                dash = DASHES[place % len(DASHES)] if many else "solid"
                canvas.line(named, style, points, dash=dash)
        if canvas.traces:
            plots.append(canvas.plot(f"Kernels: {title}", "The same attention, by backend.", toggles="xy"))
    return plots

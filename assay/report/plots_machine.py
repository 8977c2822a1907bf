"""What the machine pays: latency, memory, kernels and what grows with the context, by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from assay.report.collect import Arm, Point, Row, Stage, over_seeds
from assay.report.figures import Canvas, Plot, Style, arms_with, series
from assay.report.words import join, kind, label, number, unit

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


GROWTH = (
    ("decode_s", "Time of a decode step by context", "time of a step (s)"),
    ("decode_held_bytes", "Memory of decoding by context", "state and working memory (bytes)"),
    ("prefill_s", "Time of prefill by context", "time of prefill (s)"),
    ("prefill_held_bytes", "Memory of prefill by context", "state and working memory (bytes)"),
)


def growth(stage: Stage, styles: Styles) -> list[Plot]:
    """Time and memory of prefill and of a decode step against context, a view a batch, and where arms pass the base."""
    arms, plots = arms_with(stage.arms, "growth"), []
    for key, title, words in GROWTH:
        canvas, notes = Canvas("context (tokens)", words, True, True, x_kind="binary", y_kind=kind(key)), []
        for batch in _batches(stage, "growth"):
            lines = [
                (arm, over_seeds([r for r in arm.rows["growth"] if r["batch"] == batch], "context", key))
                for arm in arms
            ]
            for arm, points in lines:
                canvas.line(arm, styles[arm.name], points, f"batch {batch}")
            notes.append(crossings(lines, batch))
        if canvas.traces:
            plots.append(canvas.plot(title, " ".join(filter(None, notes)), toggles="xy"))
    return plots


def crossings(lines: Sequence[tuple[Arm, Sequence[Point]]], batch: Any) -> str:
    """From which context on each arm stays below the base arm, in words; nothing without a base arm's line."""
    base = next(((arm, {p.x: p.mean for p in points}) for arm, points in lines if arm.is_base and points), None)
    if base is None:
        return ""
    found: dict[float | None, list[str]] = {}
    for arm, points in lines:
        if not arm.is_base and any(p.x in base[1] for p in points):
            found.setdefault(below(points, base[1]), []).append(arm.title)
    places = sorted(((at, names) for at, names in found.items() if at is not None), key=lambda place: place[0])
    said = [f"from {at:,.0f} tokens on {join(names)}" for at, names in places]
    said += [f"never {join(found[None])}" if None in found else ""]
    told = "; ".join(filter(None, said))
    return f"Batch {batch}, below {base[0].title}: {told}." if told else ""


def below(points: Sequence[Point], base: Mapping[float, float]) -> float | None:
    """The first shared context from which on a line stays below the base's; None where its end is not below."""
    first = None
    for point in sorted(points, key=lambda p: p.x, reverse=True):
        if point.x in base:
            if point.mean >= base[point.x]:
                break
            first = point.x
    return first

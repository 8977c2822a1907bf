"""What was decided: forest plots of the verdicts, and quality against state bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from assay.report.collect import Arm, Stage
from assay.report.figures import BASE_COLOUR, PALETTE, SYMBOLS, VERDICT_COLOURS, VERDICT_SYMBOLS, Canvas, Plot, Style
from assay.report.words import (
    bytes_,
    interval,
    label,
    lower_is_better,
    number,
    plural,
    significant,
    title_of,
    unit,
    wrapped,
)


def forests(stage: Stage) -> list[Plot]:
    """One forest a metric: each arm's difference from the base with its interval, over the band of the noise floor."""
    plots = [_forest(stage, metric) for metric in stage.metrics]
    return [plot for plot in plots if plot is not None]


def _forest(stage: Stage, metric: str) -> Plot | None:
    found = [(arm, v.values) for arm in stage.arms if (v := stage.verdict(arm.name, metric)) is not None]
    found = [(arm, values) for arm, values in found if number(values.get("delta")) is not None]
    if not found:
        return None
    base = stage.base.title if stage.base else "the baseline"
    canvas = Canvas(f"difference ({label(unit(metric) or title_of(metric), 30)})", "")
    for row, (arm, values) in enumerate(reversed(found)):
        canvas.add(_difference(values, row, metric), name=arm.title)
    canvas.axes["y"] = {
        "tickvals": list(range(len(found))),
        "ticktext": [wrapped(arm.title) for arm, _ in reversed(found)],
        "range": [-0.6, len(found) - 0.4],
        "zeroline": False,
        "showgrid": False,
    }
    floors = [f for _, values in found if (f := number(values.get("noise"))) is not None]
    if floors:
        canvas.shapes.append(_band(max(floors)))
    canvas.shapes.append({"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"width": 1}})
    _directions(canvas, lower_is_better(metric))
    note = f"Points are differences from {base}, bars their intervals, the band the noise floor of its seeds."
    return canvas.plot(f"Differences in {title_of(metric)}", note, height=110 + 38 * len(found), wide=True)


def _difference(values: Mapping[str, Any], row: int, metric: str) -> Any:
    delta, low, high = (number(values.get(key)) for key in ("delta", "low", "high"))
    word = str(values.get("verdict"))
    colour = VERDICT_COLOURS.get(word, BASE_COLOUR)
    mean, reach = interval(delta, low, high)
    trace = go.Scatter(
        x=[delta],
        y=[row],
        mode="markers",
        marker={"size": 12, "symbol": VERDICT_SYMBOLS.get(word, "circle-open"), "color": colour},
        customdata=[f"{mean} {unit(metric)}<br>interval {reach}<br>{label(word)}"],
        hovertemplate="%{customdata}<extra>%{fullData.name}</extra>",
    )
    if delta is not None and low is not None and high is not None:
        trace.error_x = {"type": "data", "array": [high - delta], "arrayminus": [delta - low], "color": colour}
        trace.error_x.thickness = 2
    return trace


def _band(floor: float) -> dict[str, Any]:
    fill = {"fillcolor": BASE_COLOUR, "opacity": 0.18, "line": {"width": 0}, "layer": "below"}
    return {"type": "rect", "x0": -floor, "x1": floor, "y0": 0, "y1": 1, "yref": "paper", **fill}


def _directions(canvas: Canvas, lower: bool) -> None:
    left, right = ("◂ better", "worse ▸") if lower else ("◂ worse", "better ▸")
    for x, anchor, text in ((0, "left", left), (1, "right", right)):
        place = {"x": x, "xref": "paper", "y": 1, "yref": "paper", "xanchor": anchor, "yanchor": "bottom"}
        canvas.notes.append({**place, "text": text, "showarrow": False})


def sections(stages: Sequence[Stage]) -> list[Plot]:
    """One plot of loss against state for each recipe, since losses under two recipes do not compare."""
    recipes = dict.fromkeys(stage.recipe_digest for stage in stages)
    plots = [pareto([s for s in stages if s.recipe_digest == recipe], recipe) for recipe in recipes]
    return [plot for plot in plots if plot is not None]


def pareto(stages: Sequence[Stage], recipe: str | None) -> Plot | None:
    """Every arm's mean loss and state bytes, and the front: no other arm is better in one and as good in the other."""
    points: dict[str, tuple[float, float, Arm, Stage]] = {}
    for stage in stages:
        for arm in stage.arms:
            state, loss = arm.mean("state_bytes_per_token"), arm.mean("loss_nats")
            if state is not None and loss is not None:
                points.setdefault(arm.spec_digest or f"{stage.name}/{arm.name}", (state, loss, arm, stage))
    if len(points) < 2:
        return None
    is_log = min(p[0] for p in points.values()) > 0
    canvas = Canvas("state (bytes/token)", "held-out loss (nats/token)", is_log, x_kind="bytes")
    front = _front([p[:2] for p in points.values()])
    line = {"color": BASE_COLOUR, "width": 2, "dash": "dot", "shape": "hv"}
    canvas.add(go.Scatter(x=[p[0] for p in front], y=[p[1] for p in front], mode="lines", line=line, hoverinfo="skip"))
    for place, stage in enumerate(stages):
        style = Style(PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)], "solid")
        own = [p for p in points.values() if p[3] is stage]
        if own:
            canvas.add(_cloud(own, style, set(front)), name=stage.title, style=style)
    title = ", ".join(stage.title for stage in stages if any(p[3] is stage for p in points.values()))
    note = "Lower and further left is better. Filled marks are on the front: nothing is smaller and as good."
    note += f" Recipe {recipe}." if recipe else ""
    return canvas.plot(title, note, height=400, wide=True, toggles="x")


def _cloud(points: Sequence[tuple[float, float, Arm, Stage]], style: Style, front: set[Any]) -> Any:
    symbols = [style.symbol + ("" if (state, loss) in front else "-open") for state, loss, _, _ in points]
    details = [
        f"{label(arm.title)}<br>{bytes_(state)} a token<br>{significant(loss)} nats, {plural(len(arm.trials), 'seed')}"
        for state, loss, arm, _ in points
    ]
    return go.Scatter(
        x=[p[0] for p in points],
        y=[p[1] for p in points],
        mode="markers",
        marker={"symbol": symbols, "size": 11, "color": style.colour, "line": {"width": 2, "color": style.colour}},
        customdata=details,
        hovertemplate="%{customdata}<extra>%{fullData.name}</extra>",
    )


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other dominates (smaller or equal in both, smaller in one), by rising state."""
    front: list[tuple[float, float]] = []
    for state, loss in sorted(set(points)):
        if not front or loss < front[-1][1]:
            front.append((state, loss))
    return front

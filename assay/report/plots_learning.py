"""What training shows: loss curves, loss by position, extrapolation, passkey, steps to a loss, learning-rate sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from assay.report.collect import Arm, Row, Stage, curve_rows, over_places, over_seeds
from assay.report.figures import Canvas, Plot, Style, arms_with, series, vertical
from assay.report.words import number

Styles = Mapping[str, Style]
WINDOWS = (("whole window", "loss_nats"), ("last positions", "last_nats"))


def curves(stage: Stage, styles: Styles) -> list[Plot]:
    """Loss against tokens, on held-out and on training text."""
    canvas = Canvas("training tokens", "loss (nats/token)")
    for view, key in (("held-out", "valid_curve"), ("training", "curve")):
        for arm in stage.arms:
            rows = [row for t in arm.trials for row in curve_rows(t.values.get(key), "tokens", "loss_nats")]
            canvas.line(arm, styles[arm.name], over_seeds(rows, "tokens", "loss_nats"), view)
    note = "Mean over seeds; bars reach from the smallest to the largest seed."
    return [canvas.plot("Loss during training", note, height=380, wide=True, toggles="xy")] if canvas.traces else []


def by_position(stage: Stage, styles: Styles) -> list[Plot]:
    canvas = Canvas("position in the window", "loss (nats/token)", x_kind="binary")
    for arm in stage.arms:
        rows = [row for t in arm.trials for row in curve_rows(t.values.get("by_position"), "position", "loss_nats")]
        canvas.line(arm, styles[arm.name], over_seeds(rows, "position", "loss_nats"))
    note = "How much each token of context helps: a curve that keeps falling uses its context."
    return [canvas.plot("Loss by position", note, toggles="x")] if canvas.traces else []


def extrapolation(stage: Stage, styles: Styles) -> list[Plot]:
    """Loss against the ratio of test to training length; a variant (position scaling) is a line of its arm's colour."""
    canvas = Canvas("length / training length", "loss (nats/token)", log_x=True)
    for view, key in WINDOWS:
        for arm in arms_with(stage.arms, "extrapolation"):
            plain = ("", "None", "base", arm.name)
            for named, style, rows in series(arm, arm.rows["extrapolation"], "variant", styles[arm.name], plain=plain):
                canvas.line(named, style, over_seeds(rows, "ratio", key), view)
    note = "Flat is good: loss at longer windows."
    return [_against_ratio(canvas, "Beyond the training length", note)] if canvas.traces else []


def recovery(stage: Stage, styles: Styles) -> list[Plot]:
    """Loss against length of each variant (position scaling), as it is and after fine-tuning at a longer length."""
    canvas = Canvas("length / training length", "loss (nats/token)", log_x=True)
    arms = arms_with(stage.arms, "recovery")
    for view, key in WINDOWS:
        for arm in arms:
            for named, style, rows in series(
                arm, arm.rows["recovery"], "variant", styles[arm.name], alone=len(arms) == 1
            ):
                for tuned, dash, word in ((False, "dot", "zero-shot"), (True, "solid", "fine-tuned")):
                    own = over_seeds([row for row in rows if bool(row.get("tuned")) is tuned], "ratio", key)
                    canvas.line(named, style, own, view, dash=dash, hover=word)
    note = "Dotted: the trained weights as they are. Solid: after a short fine-tuning at a longer length."
    return [_against_ratio(canvas, "Recovery by fine-tuning", note)] if canvas.traces else []


def _against_ratio(canvas: Canvas, title: str, note: str) -> Plot:
    """Ticks at the measured ratios, but for those too close to the one before to be read, and the trained length."""
    ticks: list[float] = []
    for ratio in sorted({number(x) or 1.0 for _, trace in canvas.traces for x in trace.x}):
        if not ticks or ratio >= 1.3 * ticks[-1]:
            ticks.append(ratio)
    canvas.axes["x"] = {"tickvals": ticks, "ticktext": [f"{r:g}×" for r in ticks], "tickangle": 0}
    line, text = vertical(1.0, " trained length")
    canvas.shapes.append(line)
    canvas.notes.append(text)
    return canvas.plot(title, note, toggles="xy")


def passkey(stage: Stage, styles: Styles) -> list[Plot]:
    """Accuracy against length, and one map of length by distance with a view for each arm."""
    lines, chance = Canvas("context length (tokens)", "accuracy", True, x_kind="binary", y_kind="share"), 0.0
    maps = Canvas("context length (tokens)", "distance to the key (tokens)")
    for arm in arms_with(stage.arms, "passkey"):
        rows = arm.rows["passkey"]
        lines.line(arm, styles[arm.name], over_seeds(over_places(rows, "length", "accuracy"), "length", "accuracy"))
        chance = max([chance, *(number(row.get("chance")) or 0.0 for row in rows)])
        maps.add(_accuracy_map(rows), arm.title)
    if not lines.traces:
        return []
    lines.axes["y"] = {"range": [-0.03, 1.05], "tickformat": ".0%"}
    lines.shapes.append(
        {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": chance, "y1": chance, "line": {"dash": "dot"}}
    )
    lines.notes.append(
        {"x": 1, "xref": "paper", "y": chance, "yanchor": "bottom", "xanchor": "right", "text": "chance"}
    )
    lines.notes[-1]["showarrow"] = False
    maps.axes = {"x": {"type": "category", "showgrid": False}, "y": {"type": "category", "showgrid": False}}
    plots = [
        lines.plot("Passkey retrieval", "Mean over distances; bars reach from the worst to the best seed.", toggles="x")
    ]
    if any(len(trace.x) > 1 and len(trace.y) > 1 for _, trace in maps.traces):
        plots.append(maps.plot("Passkey by length and distance", "Accuracy, mean over seeds."))
    return plots


def _accuracy_map(rows: Sequence[Row]) -> Any:
    lengths = [p.x for p in over_seeds(rows, "length", "length")]
    distances = [p.x for p in over_seeds(rows, "distance", "distance")]
    cells = []
    for distance in distances:
        at = {p.x: p.mean for p in over_seeds([r for r in rows if r.get("distance") == distance], "length", "accuracy")}
        cells.append([at.get(length) for length in lengths])
    return go.Heatmap(
        x=[f"{v:g}" for v in lengths],
        y=[f"{v:g}" for v in distances],
        z=cells,
        zmin=0,
        zmax=1,
        colorscale="Cividis",
        colorbar={"tickformat": ".0%", "thickness": 12, "outlinewidth": 0},
        hovertemplate="length %{x}<br>distance %{y}<br>accuracy %{z:.1%}<extra></extra>",
        xgap=1,
        ygap=1,
    )


def steps_to_loss(stage: Stage, styles: Styles) -> list[Plot]:
    canvas = Canvas("loss reached (nats/token)", "training tokens")
    for arm in arms_with(stage.arms, "steps_to_loss"):
        canvas.line(arm, styles[arm.name], over_seeds(arm.rows["steps_to_loss"], "loss_nats", "tokens"))
    canvas.axes["x"] = {"autorange": "reversed"}
    return [canvas.plot("Tokens to reach a loss", "Lower is faster.", toggles="y")] if canvas.traces else []


def sweeps(stage: Stage, styles: Styles) -> list[Plot]:
    """Loss against learning rate, the optimum marked."""
    canvas = Canvas("learning rate", "loss (nats/token)", log_x=True)
    by_name = {arm.name: arm for arm in stage.arms}
    for sweep in stage.of("sweep"):
        name = str(sweep.arm)
        arm = by_name.get(name) or Arm(name, name, {}, False, None)
        style = styles.get(name) or Style("#858b91", "circle", "solid")
        rows = curve_rows(sweep.values, "learning_rate", "loss_nats")
        canvas.line(arm, style, over_seeds(rows, "learning_rate", "loss_nats"), bars=False)
        best = number(sweep.values.get("optimum"))
        if best and best > 0:
            canvas.shapes.append(
                {
                    "type": "line",
                    "x0": best,
                    "x1": best,
                    "y0": 0,
                    "y1": 0.06,
                    "yref": "paper",
                    "line": {"color": style.colour, "width": 3},
                }
            )
    note = f"The tick at the foot is each arm's optimum. {stage.info.get('note') or ''}".strip()
    return [canvas.plot("Learning-rate sweep", note)] if canvas.traces else []

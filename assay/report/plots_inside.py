"""What happens inside: attention sinks, what a few keys hold, the logit lens, position wavelengths."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

from assay.report.collect import Stage, over_seeds
from assay.report.figures import SHARES, Canvas, Plot, Style, arms_with, series
from assay.report.words import axis, kind, number

Styles = Mapping[str, Style]


def attention(stage: Stage, styles: Styles) -> list[Plot]:
    """By layer: the mass on the first token, the entropy, the largest logit."""
    quantities = (
        ("sink_mass", "Attention sinks", "How much attention rests on the first token."),
        ("entropy_nats", "Attention entropy", "Low is focused, high is spread."),
        ("max_logit", "Largest attention logit", "Growth here precedes instability."),
    )
    plots = []
    for key, title, note in quantities:
        canvas = Canvas("layer", axis(key), x_kind="whole", y_kind=kind(key))
        for arm in arms_with(stage.arms, "attention"):
            canvas.line(arm, styles[arm.name], over_seeds(arm.rows["attention"], "layer", key))
        if canvas.y_kind == "share":
            canvas.axes["y"] = SHARES
        if canvas.traces:
            plots.append(canvas.plot(title, note))
    return plots


def sparsity(stage: Stage, styles: Styles) -> list[Plot]:
    """What a few keys hold and what is lost without the others, by who chooses them, for arms that were told to."""
    quantities = (
        ("mass", "Attention that a few keys hold", "Of the queries that see the most; of the model as it is."),
        ("loss_delta_nats", "Loss without the other keys", "What the loss grows by when all layers see no others."),
        ("accuracy", "Passkeys found without the other keys", "Half the length back, and as far back as there are."),
    )
    found = [
        (arm, [row for row in arm.rows["sparsity"] if row.get("method") != "none"])
        for arm in arms_with(stage.arms, "sparsity")
    ]
    told = [(arm, rows) for arm, rows in found if rows]
    plots = []
    for key, title, note in quantities:
        canvas = Canvas("keys that a query sees", axis(key), True, x_kind="binary", y_kind=kind(key))
        for arm, rows in told:
            for named, style, group in series(arm, rows, "method", styles[arm.name], alone=len(told) == 1):
                canvas.line(named, style, over_seeds(group, "keep", key))
        if canvas.y_kind == "share":
            canvas.axes["y"] = SHARES
        if canvas.traces:
            plots.append(canvas.plot(title, note))
    return plots


def lens(stage: Stage, styles: Styles) -> list[Plot]:
    canvas = Canvas("layer", "loss read off the layer (nats/token)", x_kind="whole")
    for arm in arms_with(stage.arms, "lens"):
        canvas.line(arm, styles[arm.name], over_seeds(arm.rows["lens"], "layer", "loss_nats"))
    note = "The head applied after each layer: where the prediction is made."
    return [canvas.plot("Logit lens", note)] if canvas.traces else []


def wavelengths(stage: Stage, styles: Styles) -> list[Plot]:
    """Wavelength of each rotated pair; open marks never complete a turn within the trained length."""
    canvas = Canvas("dimension pair", "wavelength (tokens)", log_y=True, x_kind="whole")
    for arm in arms_with(stage.arms, "wavelengths"):
        rows = [r for r in arm.rows["wavelengths"] if number(r.get("dim")) is not None]
        rows = list({float(r["dim"]): r for r in rows if number(r.get("wavelength")) is not None}.values())
        style = styles[arm.name]
        trace = go.Scatter(
            x=[r["dim"] for r in rows],
            y=[r["wavelength"] for r in rows],
            mode="markers",
            marker={
                "symbol": ["circle" if r.get("completes") else "circle-open" for r in rows],
                "size": 8,
                "color": style.colour,
            },
            customdata=["completes a turn" if r.get("completes") else "never completes a turn" for r in rows],
            hovertemplate="pair %{x}<br>%{y:,.5~g} tokens<br>%{customdata}<extra>%{fullData.name}</extra>",
        )
        canvas.add(trace, name=arm.title, style=style)
    note = "Filled: completes a turn within the trained length. Open: never does, so longer inputs show it new angles."
    return [canvas.plot("Position wavelengths", note, toggles="y")] if canvas.traces else []

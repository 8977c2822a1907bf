"""The drawing kit: a Canvas collects traces by view and becomes a Plot; the page chooses paper and ink."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from assay.report.collect import Arm, Point, Row
from assay.report.words import bytes_, label, plural, seconds, significant

# Distinct for the common kinds of colour blindness, on white and on near-black; symbols repeat the distinction.
PALETTE = ("#2f7fc1", "#d9822b", "#1a9d76", "#b8569b", "#8c6bd1", "#c9482b", "#3fa9c9", "#a38a1c")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot")
BASE_COLOUR = "#858b91"
VERDICT_COLOURS = {"better": "#2f7fc1", "worse": "#d2691e", "not distinguishable": "#858b91", "not tested": "#858b91"}
VERDICT_SYMBOLS = {
    "better": "triangle-left",
    "worse": "triangle-right",
    "not distinguishable": "diamond",
    "not tested": "circle-open",
}
GLYPHS = {
    "circle": "●", "circle-open": "○", "square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "✚", "x": "✖",
    "star": "★", "hexagon": "⬢",
}  # fmt: skip
SHARES = {"tickformat": ".1~%", "rangemode": "tozero"}
"""A linear axis of shares: percent from zero, with a decimal where the ticks need one."""
MOST_POINTS = 240


@dataclass(frozen=True)
class Style:
    colour: str
    symbol: str
    dash: str


@dataclass
class Entry:
    """A line of the legend: its name as written (the page escapes it), its style, and the traces it switches."""

    name: str
    style: Style
    traces: list[int]

    @property
    def glyph(self) -> str:
        return GLYPHS.get(self.style.symbol, "●")


@dataclass(frozen=True)
class Plot:
    """One figure: `spec` is plotly JSON; `views` say which traces show together, `toggles` which axes can turn log."""

    title: str
    note: str
    spec: Mapping[str, Any]
    height: int
    wide: bool
    toggles: tuple[str, ...]
    views: tuple[tuple[str, tuple[bool, ...]], ...]
    legend: tuple[Entry, ...]


def styles_of(arms: Sequence[Arm]) -> dict[str, Style]:
    """The base arm is grey; the others walk the palette, then the symbols, then the dashes."""
    styles = {}
    place = 0
    for arm in arms:
        if arm.is_base:
            styles[arm.name] = Style(BASE_COLOUR, "circle-open", "solid")
            continue
        cycle = place // len(PALETTE)
        styles[arm.name] = Style(
            PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)], DASHES[cycle % len(DASHES)]
        )
        place += 1
    return styles


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS of them, evenly, with the last kept."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stride = len(points) / (MOST_POINTS - 1)
    return [points[int(i * stride)] for i in range(MOST_POINTS - 1)] + [points[-1]]


@dataclass
class Canvas:
    """Axes `x` and `y` are titles; `log_x` and `log_y` how they start; the kinds say how their numbers read:
    'binary' (powers of two: lengths), 'whole' (layers), 'bytes', 'seconds', 'share' (0 to 1) or '' (plain)."""

    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    x_kind: str = ""
    y_kind: str = ""
    traces: list[tuple[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, dict[str, Any]] = field(default_factory=dict)
    legend: dict[str, Entry] = field(default_factory=dict)

    def add(self, trace: Any, view: str = "", *, name: str = "", style: Style | None = None) -> None:
        """A trace of its own making; with a name and a style it stands in the legend. Views are named as written."""
        if style is not None:
            self.legend.setdefault(name, Entry(name, style, [])).traces.append(len(self.traces))
        trace.name, trace.showlegend = label(name) or None, False
        self.traces.append((view, trace))

    def line(
        self, arm: Arm, style: Style, points: Sequence[Point], view: str = "", *, bars: bool = True, **marks: Any
    ) -> None:
        """The arm's mean over seeds at each x; bars and hover give the smallest and largest seed."""
        if not points:
            return
        points = thin(points)
        is_long = len(points) > 40
        trace = go.Scatter(
            x=[p.x for p in points],
            y=[_short(p.mean) for p in points],
            mode="lines" if is_long else "lines+markers",
            line={"color": style.colour, "dash": marks.get("dash", style.dash), "width": marks.get("width", 2)},
            marker={"symbol": marks.get("symbol", style.symbol), "size": 7, "color": style.colour},
            customdata=[[reading(p.mean, self.y_kind), _spread(p, self.y_kind)] for p in points],
            hovertemplate=_hover(self.x, self.y, marks.get("hover", "")),
        )
        if bars and not is_long and any(p.n > 1 for p in points):
            trace.error_y = {
                "type": "data",
                "array": [_short(p.high - p.mean) for p in points],
                "arrayminus": [_short(p.mean - p.low) for p in points],
                "thickness": 1,
                "width": 3,
                "color": style.colour,
            }
        self.add(trace, view, name=arm.title, style=style)

    def plot(self, title: str, note: str = "", *, height: int = 300, wide: bool = False, toggles: str = "") -> Plot:
        """The finished figure; the first view is the one shown. Toggles: any of 'x', 'y'."""
        views = list(dict.fromkeys(view for view, _ in self.traces if view))
        for view, trace in self.traces:
            trace.visible = view in ("", *views[:1])
        figure = go.Figure([trace for _, trace in self.traces])
        figure.update_layout(
            template="none",
            height=height,
            xaxis={"title": {"text": self.x}, "type": "log" if self.log_x else "linear", **self.axes.get("x", {})},
            yaxis={"title": {"text": self.y}, "type": "log" if self.log_y else "linear", **self.axes.get("y", {})},
            shapes=self.shapes,
            annotations=self.notes,
            meta={"x": self.x_kind, "y": self.y_kind},
        )
        spec = json.loads(figure.to_json())
        spec["layout"].pop("template", None)
        choices = tuple((v, tuple(view in ("", v) for view, _ in self.traces)) for v in views)
        legend = tuple(self.legend.values()) if len(self.legend) > 1 else ()
        return Plot(title, note, spec, height, wide, tuple(toggles), choices if len(choices) > 1 else (), legend)


def reading(value: float, kind: str) -> str:
    """A number of this kind, for a hover."""
    if kind == "bytes":
        return f"{bytes_(value)} ({value:,.0f} B)" if value >= 1024 else bytes_(value)
    if kind == "seconds":
        return seconds(value)
    if kind == "share":
        return f"{100 * value:.1f}%".replace("%", "&#37;")
    return significant(value, 5)


def _short(value: float) -> float:
    """Six significant digits: what is drawn needs no more, and the file stays small."""
    return float(f"{value:.6g}")


def _spread(point: Point, kind: str) -> str:
    if point.n == 1:
        return "1 seed"
    return f"{plural(point.n, 'seed')}: {reading(point.low, kind)} to {reading(point.high, kind)}"


def _hover(x: str, y: str, extra: str) -> str:
    lines = [f"{x}: %{{x:,.6~g}}", f"{y}: %{{customdata[0]}}", "%{customdata[1]}", *([extra] if extra else [])]
    return "<br>".join(lines) + "<extra>%{fullData.name}</extra>"


def vertical(at: float, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dotted line over the whole height of a log axis, and its name at the top.

    Plotly places shapes on a log axis by value, and annotations by its log10."""
    line = {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": {"dash": "dot", "width": 1}}
    place = {"x": math.log10(at), "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "top"}
    return line, {**place, "text": text, "showarrow": False}


def arms_with(arms: Iterable[Arm], what: str) -> list[Arm]:
    return [arm for arm in arms if arm.rows.get(what)]


def series(
    arm: Arm, rows: Iterable[Row], key: str, style: Style, *, plain: Sequence[str] = (), alone: bool = False
) -> list[tuple[Arm, Style, list[Row]]]:
    """An arm's rows apart by `key` (variant, backend), each with a name and a style for the legend.

    They keep the arm's colour and walk the symbols and dashes; what is in `plain` is the arm itself. `alone`: no other
    arm has such rows, so they are named without it and walk the palette."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get(key, "")), []).append(row)
    found = []
    for place, (value, group) in enumerate(groups.items()):
        symbol = SYMBOLS[place % len(SYMBOLS)]
        if value in plain:
            found.append((arm, style, group))
            continue
        title = value if alone else f"{arm.title}: {value}"
        own = Style(PALETTE[place % len(PALETTE)], symbol, "solid")
        own = own if alone else Style(style.colour, symbol, DASHES[place % len(DASHES)])
        found.append((Arm(value if alone else f"{arm.name}/{value}", title, {}, False, None), own, group))
    return found

"""What was measured at several points of the training: one plot a quantity, against the tokens seen by then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from assay.report.collect import Row, Stage, over_places, over_seeds
from assay.report.figures import SHARES, Canvas, Plot, Style, arms_with
from assay.report.words import DURING, PLACES, axis, kind, label, number, title_of

MOST_VIEWS = 12
WHEN = ("part", "at_tokens", "seed")


def during(stage: Stage, styles: Mapping[str, Style]) -> list[Plot]:
    """Every `training.NAME` of a stage, a line an arm; views are the mean over layers (or lengths, ...) and each."""
    topics = dict.fromkeys(what for arm in stage.arms for what in arm.rows if what.startswith(DURING))
    return [plot for what in topics for key in _quantities(stage, what) if (plot := _plot(stage, styles, what, key))]


def _rows(stage: Stage, what: str) -> list[Row]:
    return [row for arm in arms_with(stage.arms, what) for row in arm.rows[what]]


def _quantities(stage: Stage, what: str) -> list[str]:
    """The columns that hold a measured number, in the order of the rows."""
    keys = dict.fromkeys(key for row in _rows(stage, what) for key in row if key not in (*WHEN, *PLACES))
    return [key for key in keys if any(number(row.get(key)) is not None for row in _rows(stage, what))]


def _plot(stage: Stage, styles: Mapping[str, Style], what: str, key: str) -> Plot | None:
    canvas = Canvas("training tokens", label(axis(key)), y_kind=kind(key))
    place, values = _varying(_rows(stage, what))
    for arm in arms_with(stage.arms, what):
        rows, style = arm.rows[what], styles[arm.name]
        every = over_places(rows, "at_tokens", key)
        canvas.line(arm, style, over_seeds(every, "at_tokens", key), f"mean of {place}s" if place else "")
        for value in values:
            own = over_places((row for row in rows if row.get(place) == value), "at_tokens", key)
            canvas.line(arm, style, over_seeds(own, "at_tokens", key), f"{place} {value}")
    if canvas.y_kind == "share":
        canvas.axes["y"] = SHARES
    topic = title_of(what.removeprefix(DURING))
    note = f"Measured ({topic}) at the validation points; bars reach from the smallest to the largest seed."
    name = title_of(key)
    return canvas.plot(f"{name[:1].upper()}{name[1:]} during training", note, toggles="xy") if canvas.traces else None


def _varying(rows: Iterable[Row]) -> tuple[str, list[object]]:
    """The first place that a topic's rows differ in, with its values; none where they are too many to choose from."""
    held = list(rows)
    for place in PLACES:
        values = list(dict.fromkeys(v for row in held if isinstance(v := row.get(place), (int, float, str))))
        if 1 < len(values) <= MOST_VIEWS:
            return place, list(values)
    return "", []

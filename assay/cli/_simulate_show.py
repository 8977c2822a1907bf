"""A simulation for people: tables, and a page of distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.cli._bill import COLOURS, DASHES, empty, plain, span

if TYPE_CHECKING:
    from assay.simulate.run import Run

LATENCIES = {"ttft_s": "first token", "tbt_s": "token gap", "tpot_s": "mean gap", "latency_s": "whole reply"}
POINTS = ("p50", "p90", "p99", "max")
SHOWN = 400


def show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console, arms = Console(highlight=False), found["arms"]
    rate = found["rate"]
    come = "all at once" if rate == float("inf") else f"{rate:.3g} a second"
    console.print(escape(f"{found['requests']} requests of {found['trace']}, {come}, on {found['machine']['name']}"))
    table = empty(["", *arms])
    for label, cells in rows(list(arms.values())):
        table.add_row(label, *cells)
    console.print(table)
    waste = empty(["memory set aside for state", "holds nothing", "requests served"])
    for one in found["waste"]:
        waste.add_row(one["policy"], f"{one['waste']:.1%}", f"{one['fits']:.1%}")
    console.print(waste)
    if found["hit_rates"]:
        hits = empty(["blocks cached", "found, lru", "found, lfu"])
        for one in found["hit_rates"]:
            blocks = "all" if one["blocks"] is None else f"{one['blocks']:,}"
            hits.add_row(blocks, f"{one['lru']:.1%}", f"{one['lfu']:.1%}")
        console.print(hits)


def rows(arms: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """A label, and a cell for each arm."""
    made = [("machines", [str(arm["machines"]) for arm in arms])]
    made += [
        (f"{words}, {point}", ["-" if arm[key] is None else span(arm[key][point]) for arm in arms])
        for key, words in LATENCIES.items()
        for point in POINTS
    ]
    made.append(("replies a second", [f"{arm['throughput_req_s']:.3g}" for arm in arms]))
    made.append(("tokens a second", [f"{arm['throughput_tok_s']:,.0f}" for arm in arms]))
    made.append(("machines at work", [f"{arm['busy']:.0%}" for arm in arms]))
    for key, words in (("attained", "within the limits"), ("hit_rate", "prompt tokens cached")):
        if any(arm[key] is not None for arm in arms):
            made.append((words, ["-" if arm[key] is None else f"{arm[key]:.1%}" for arm in arms]))
    for key, words in (("preempted", "preempted"), ("refused", "refused: no room")):
        if any(arm[key] for arm in arms):
            made.append((words, [str(arm[key]) for arm in arms]))
    if all("goodput_req_s" in arm for arm in arms):
        made.append(("goodput, a second", [f"{arm['goodput_req_s']:.3g}" for arm in arms]))
    return made


def show_check(found: Mapping[str, Any]) -> None:
    from rich.console import Console

    console, steps = Console(highlight=False), found["steps"]
    how = "fitted to them" if found["fitted"] else "as given"
    console.print(
        f"{steps['rows']} steps, costs {how}: R2 {steps['r2']:.3f}, mean error {steps['mean_error']:.1%}, "
        f"90 % within {steps['p90_error']:.1%}, worst {steps['worst_error']:.1%}"
    )
    costs = empty(["cost", "seconds"])
    for name, value in steps["cost"].items():
        costs.add_row(name, f"{value:.3g}")
    console.print(costs)
    table = empty(["", "measured", "simulated", "error"])
    for key, words in (("ttft", "first token"), ("latency", "whole reply")):
        for point in ("mean", "p50", "p99"):
            one = found[key][point]
            table.add_row(f"{words}, {point}", span(one["measured"]), span(one["simulated"]), f"{one['error']:+.1%}")
    console.print(table)
    for name, work in found["work"].items():
        console.print(f"{name}: {work['steps']} steps, {work['prefill']} prompt tokens, {work['decodes']} decodes")


def draw(found: Mapping[str, Any], runs: Mapping[str, Run], path: Path) -> None:
    """A self-contained page: how many requests, or gaps between tokens, took at most how long; goodput; hit rates."""
    from plotly.subplots import make_subplots

    goodputs = {name: arm["goodput_req_s"] for name, arm in found["arms"].items() if "goodput_req_s" in arm}
    titles = ["time to the first token", "time between tokens"]
    titles += ["goodput, requests a second"] * bool(goodputs) + ["blocks found in a cache"] * bool(found["hit_rates"])
    figure = make_subplots(rows=len(titles), cols=1, subplot_titles=titles, vertical_spacing=0.32 / len(titles))
    for number, (name, run) in enumerate(runs.items()):
        line = {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number % len(DASHES)]}
        done = [one for one in run.served if one.done]
        for row, values in enumerate(([one.ttft for one in done], [gap for one in done for gap in one.gaps]), 1):
            x, y = distribution(values)
            legend = {"name": plain(name), "legendgroup": name, "showlegend": row == 1}
            figure.add_scatter(x=x, y=y, mode="lines", line=line, row=row, col=1, **legend)
    for row in (1, 2):
        figure.update_xaxes(type="log", title="seconds", row=row, col=1)
        figure.update_yaxes(title="share", tickformat=".0%", row=row, col=1)
    if goodputs:
        names = [plain(name) for name in goodputs]
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
        bars = {"marker": {"color": colours}, "showlegend": False}
        figure.add_bar(x=names, y=list(goodputs.values()), row=3, col=1, **bars)
    if found["hit_rates"]:
        _hit_rates(figure, found["hit_rates"], len(titles))
    figure.update_layout(
        title=plain(f"{found['trace']} on {found['machine']['name']}"),
        template="plotly_white",
        height=120 + 340 * len(titles),
    )
    path.write_text(figure.to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")


def _hit_rates(figure: Any, found: Sequence[Mapping[str, Any]], row: int) -> None:
    x = ["all" if one["blocks"] is None else f"{one['blocks']:,}" for one in found]
    for number, evict in enumerate(("lru", "lfu")):
        line = {"color": COLOURS[number], "dash": DASHES[number]}
        figure.add_scatter(x=x, y=[one[evict] for one in found], name=evict, line=line, row=row, col=1)
    figure.update_xaxes(type="category", title="blocks", row=row, col=1)
    figure.update_yaxes(title="share", tickformat=".0%", row=row, col=1)


def distribution(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The values in order with the share that is at most as large, at most SHOWN of them, the last one kept."""
    ordered = sorted(values)
    places = sorted({round(i * (len(ordered) - 1) / (SHOWN - 1)) for i in range(SHOWN)}) if ordered else []
    return [ordered[i] for i in places], [(i + 1) / len(ordered) for i in places]

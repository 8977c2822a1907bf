"""Results -> one HTML file that works offline. Reads Results only."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from assay.report import plots_during, plots_evidence, plots_inside, plots_learning, plots_machine, tables
from assay.report.collect import Stage, stages_of
from assay.report.figures import Plot, styles_of
from assay.report.summary import claim_counts, decision, headline
from assay.report.words import plural, symbol
from assay.spec.result import OUTCOMES, Result, read_results

# (heading, plots of a stage): the order in which a stage is told
_GROUPS = (
    (
        "Learning",
        (plots_learning.curves, plots_learning.by_position, plots_learning.steps_to_loss, plots_learning.sweeps),
    ),
    ("During training", (plots_during.during,)),
    ("Length and recall", (plots_learning.extrapolation, plots_learning.recovery, plots_learning.passkey)),
    (
        "Speed and memory",
        (plots_machine.latency, plots_machine.memory, plots_machine.growth, plots_machine.kernels),
    ),
    ("Inside the model", (plots_inside.attention, plots_inside.sparsity, plots_inside.lens, plots_inside.wavelengths)),
)


def write_report(folder: str | Path) -> Path:
    """folder/results.jsonl -> folder/report.html, replaced in one step; returns its path.

    ValueError when there are no results or two recipes stand in one table."""
    folder = Path(folder)
    source = folder / "results.jsonl"
    if not source.is_file():
        raise ValueError(f"{source} does not exist; expected the folder that `assay study run --out` wrote")
    results = read_results(source)
    if not results:
        raise ValueError(f"{source} holds no results yet; run the study first")
    page = render(results, _title(results) or folder.resolve().name)
    target = folder / "report.html"
    handle, name = tempfile.mkstemp(dir=folder, prefix=".report-", suffix=".html")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return target


def _title(results: Sequence[Result]) -> str:
    """The frame's title, or that of the only study; several without a frame go by what the environment calls them."""
    titles = {r.study: str(r.values["title"]) for r in results if r.kind == "study" and r.values.get("title")}
    frames = [r.study for r in results if r.kind == "study" and not r.values.get("arms") and r.study in titles]
    if frames or len(titles) == 1:
        return titles[frames[0]] if frames else next(iter(titles.values()))
    return next((r.study for r in results if r.kind == "environment"), "")


def render(results: Sequence[Result], title: str) -> str:
    """The page. ValueError when one study's results name two recipe digests."""
    every = stages_of(results)
    figures: list[dict[str, Any]] = []
    shown = [stage for stage in every if stage.has_content]
    names = tables.titles_of(shown)
    stages = [_stage(place, stage, figures, names) for place, stage in enumerate(shown, start=1)]
    counts = claim_counts(shown)
    script = _read("report.js")
    page = _environment().get_template("report.html.j2")
    return page.render(
        title=title,
        intro=next((s.info.get("question") for s in every if not s.has_content and s.info.get("question")), ""),
        headline=headline(shown),
        tiles=[(word, counts[word]) for word in OUTCOMES] if sum(counts.values()) else [],
        stages=stages,
        pareto=_cards(plots_evidence.sections(shown), figures),
        environments=tables.environments(results),
        version=next((r.version for r in reversed(results) if r.version), ""),
        commands=list(dict.fromkeys(str(s.info["command"]) for s in every if s.info.get("command"))),
        css=Markup(_read("style.css")),
        plotly=Markup(get_plotlyjs()),
        script=Markup(script),
        policy=_policy(get_plotlyjs(), script),
        figures=figures,
    )


def _stage(
    place: int, stage: Stage, figures: list[dict[str, Any]], names: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
    styles = styles_of(stage.arms)
    groups = [(name, [p for make in makers for p in make(stage, styles)]) for name, makers in _GROUPS]
    return {
        "id": f"stage-{place}",
        "name": stage.name,
        "title": stage.title,
        "info": stage.info,
        "note": "" if stage.of("sweep") else stage.info.get("note") or "",
        "runs": plural(sum(len(arm.trials) for arm in stage.arms), "run"),
        "decision": decision(stage),
        "verdicts": tables.verdict_tables(stage),
        "forests": _cards(plots_evidence.forests(stage), figures),
        "claims": tables.claim_rows(stage),
        "costs": tables.cost_table(stage),
        "groups": [(name, _cards(plots, figures)) for name, plots in groups if plots],
        "others": tables.other_tables(stage),
        "failures": tables.failures(stage),
        "synthesis": tables.synthesis(stage, names),
        "recipe_digest": stage.recipe_digest,
        "arms": [
            {
                "title": a.title,
                "name": a.name,
                "changes": tables.change_lines(a.changes),
                "digest": a.spec_digest,
                "base": a.is_base,
            }
            for a in stage.arms
        ],
    }


def _cards(plots: Sequence[Plot], figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cards for a grid of two columns: one that would stand alone in its row takes the whole row."""
    cards: list[dict[str, Any]] = []
    column = 0
    for place, plot in enumerate(plots):
        is_last = place == len(plots) - 1 or plots[place + 1].wide
        wide = plot.wide or (column == 0 and is_last)
        column = 0 if wide or column == 1 else 1
        cards.append(_card(plot, wide, figures))
    return cards


def _card(plot: Plot, wide: bool, figures: list[dict[str, Any]]) -> dict[str, Any]:
    """The card's text; the figure itself goes to the list that the page embeds once."""
    figures.append({"data": plot.spec["data"], "layout": plot.spec["layout"]})
    return {
        "figure": len(figures) - 1,
        "title": plot.title,
        "note": plot.note,
        "height": plot.height,
        "wide": wide,
        "toggles": [(axis, plot.spec["layout"].get(f"{axis}axis", {}).get("type") == "log") for axis in plot.toggles],
        "views": [{"name": name, "visible": list(visible)} for name, visible in plot.views],
        "legend": plot.legend,
    }


def _environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("assay.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["symbol"] = symbol
    return env


def _read(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """A content policy under which only these scripts run and nothing is fetched, whatever a result's text says."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )

"""What a study shows at the terminal: the dry run, and a live table of the trials that run."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live as RichLive
from rich.markup import escape
from rich.table import Table

from assay.study.plan import Plan
from assay.study.runners.local import Silent
from assay.study.times import expected_seconds, wall_seconds
from assay.study.trials import Materials, Trial


def plan_rows(plan: Plan, materials: Materials, seconds: Sequence[float | None]) -> list[dict[str, Any]]:
    """One row for each arm of each stage: seeds, tokens of one run, params, expected seconds of its own runs.

    seconds: of each trial. A run that stages share is counted where it first appears. None: nothing counts it.
    """
    rows: list[dict[str, Any]] = []
    for stage in plan.stages:
        for arm in stage.arms:
            rows.append(
                {
                    **_counts(plan, seconds, {(stage.name, arm, False)}),
                    "study": stage.name,
                    "arm": arm,
                    "tokens": stage.tokens[arm],
                    "params": int(materials.sizes(stage.models[arm][0])["params"]) if materials.sizes else None,
                    "tuned": stage.tuned.get(arm),
                }
            )
        if stage.sweep is not None:
            counts = _counts(plan, seconds, {(stage.name, arm, True) for arm in stage.arms})
            name = f"sweep of {len(stage.sweep.rates)} learning rates"
            about = {"study": stage.name, "arm": name, "tokens": stage.tokens[stage.arms[0]], "params": None}
            rows.append({**counts, **about, "seeds": stage.sweep.seeds, "tuned": None})
    return rows


def _counts(plan: Plan, seconds: Sequence[float | None], wanted: set[tuple[str, str, bool]]) -> dict[str, Any]:
    """The runs with one of these uses; those that have it first are its own."""
    uses = [[(u.study, u.arm, u.sweeps) in wanted for u in trial.uses] for trial in plan.trials]
    own = [s for s, found in zip(seconds, uses) if found[0]]
    known = [s for s in own if s is not None]
    total = sum(known) if len(known) == len(own) else None
    return {"seeds": sum(map(any, uses)), "runs": len(own), "seconds": total}


def plan_table(plan: Plan, materials: Materials, workers: int, left: Collection[Trial] | None = None) -> Table:
    """The dry run: what would be run, and for how long on so many workers. left: the trials without a Result."""
    seconds = expected_seconds(plan, materials, left) if materials.rate else None
    rows = plan_rows(plan, materials, seconds or [None] * len(plan.trials))
    caption = f"{len(plan.trials)} runs, {sum(t.tokens for t in plan.trials):,} tokens, {workers} workers"
    if left is not None and len(left) < len(plan.trials):
        caption += f", {len(plan.trials) - len(left)} runs done"
    if seconds is not None:
        caption += f", about {_duration(wall_seconds(seconds, workers))}"
    table = Table(title=escape(f"{plan.name}, budget {plan.budget}"), caption=caption)
    for name in ("study", "arm"):
        table.add_column(name)
    for name in ("seeds", "runs", "tokens", "params", "expected"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = [
            str(row["seeds"]),
            str(row["runs"]),
            f"{row['tokens']:,}",
            "" if row["params"] is None else f"{row['params']:,}",
        ]
        expected = "" if row["seconds"] is None else _duration(row["seconds"])
        table.add_row(escape(row["study"]), escape(row["arm"]), *counts, expected)
    return table


@dataclass
class _Row:
    trial: Trial
    since: float = field(default_factory=time.monotonic)
    fraction: float = 0.0
    loss: float | None = None


class Live(Silent):
    """Draws on stderr: a table while it is a terminal, and otherwise one line for each finished trial."""

    def __init__(self, trials: Sequence[Trial], console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.total, self.done, self.failed = len(trials), 0, 0
        self.began = time.monotonic()
        self.rows: dict[str, _Row] = {}
        self._live = RichLive(console=self.console, refresh_per_second=4, get_renderable=self.table, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def started(self, trial: Trial, worker: int) -> None:
        if not self.rows and not self.done:
            self.began = time.monotonic()
        self.rows[trial.name] = _Row(trial)

    def progressed(self, trial: Trial, event: dict[str, Any]) -> None:
        row = self.rows[trial.name]
        row.fraction = float(event.get("fraction", row.fraction))
        row.loss = event.get("loss_nats", row.loss)

    def finished(self, trial: Trial, why: str | None) -> None:
        row = self.rows.pop(trial.name)
        self.done += 1
        self.failed += why is not None
        taken = _duration(time.monotonic() - row.since)
        said = f"failed: {why.splitlines()[0]}" if why else f"done in {taken}"
        self.console.print(f"[{self.done}/{self.total}] {trial.name}: {said}", markup=False, highlight=False)

    def table(self) -> Table:
        table = Table(caption=self._caption())
        for name in ("study", "arm"):
            table.add_column(name)
        for name in ("seed", "progress", "loss", "left"):
            table.add_column(name, justify="right")
        for row in list(self.rows.values()):
            use, spent = row.trial.uses[0], time.monotonic() - row.since
            loss = "" if row.loss is None else f"{row.loss:.3f}"
            left = _duration(spent / row.fraction - spent) if row.fraction > 0 else ""
            cells = [str(row.trial.seed), f"{row.fraction:.0%}", loss, left]
            table.add_row(escape(use.study), escape(use.arm), *cells)
        return table

    def _caption(self) -> str:
        finished = self.done + sum(row.fraction for row in self.rows.values())
        spent = time.monotonic() - self.began
        left = f", about {_duration(spent / finished * (self.total - finished))} left" if finished else ""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} of {self.total} runs{failed}{left}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

"""A study from request to conclusions: plan, run what is missing, judge, choose, and write it all into one folder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from assay import __version__
from assay.spec.load import to_yaml
from assay.spec.result import Result
from assay.study.evidence import Evidence
from assay.study.judge import claim_results, verdict_results
from assay.study.plan import (
    CHOSEN,
    Plan,
    Rates,
    Request,
    make_plan,
    stage_like,
    synthesis_plan,
)
from assay.study.runners.folder import Folder
from assay.study.runners.local import Failed, Pool, Watcher, run_trials
from assay.study.runners.remote import Runner
from assay.study.spec import StudySpec, load_study
from assay.study.sweep import best_rates, note, sweep_results
from assay.study.synthesis import Synthesis, comparison_table, synthesise
from assay.study.times import START_S, expected_seconds, fit_scale, fixed_seconds
from assay.study.trials import Materials, Stage, Trial, part

Find = Callable[[str], tuple[str, StudySpec]]


class Watching(Protocol):
    """Makes a watcher for some trials, such as `tables.Live`."""

    def __call__(self, trials: Sequence[Trial]) -> AbstractContextManager[Watcher]: ...


@dataclass(frozen=True)
class Session:
    """What a run needs beside the request. `environment` measures the machine for the `environment` line, once the
    request is known to be good. `note` is told one line. `runner`: where trials run; this machine's pool if absent."""

    materials: Materials
    pool: Pool = field(default_factory=Pool)
    device: str = "cpu"
    command: str = ""
    environment: Callable[[], dict[str, Any]] = dict
    watch: Watching | None = None
    note: Callable[[str], None] = print
    find: Find = load_study
    runner: Runner = run_trials


@dataclass(frozen=True)
class Finished:
    plan: Plan
    failed: tuple[Failed, ...]
    results: tuple[Result, ...]


def planned(request: Request, session: Session, seconds: float | None = None, held: float | None = None) -> Plan:
    """The plan; where `seconds` (or the budget's own limit) is too short for it, every run's tokens are scaled alike.

    `held`: the scale that a folder was begun with, which a resumed run keeps.
    """
    plan = make_plan(request, session.materials, held or 1.0, session.find)
    own = request.study.budgets.get(request.budget)
    limit = seconds if seconds is not None else own.seconds if own else None
    if held is not None or limit is None or session.materials.rate is None:
        return plan
    expected, fixed = expected_seconds(plan, session.materials), fixed_seconds(plan)
    # A synthesis trains its choice later, with as many seeds as the first arm has.
    longest = max(range(len(expected)), key=expected.__getitem__)
    extra = [longest] * sum(e.synthesis is not None for e in request.study.stages) * _most_seeds(plan)
    several = [[times[i] for i in (*range(len(expected)), *extra)] for times in (expected, fixed)]
    starts = START_S * (1 + sum(e.synthesis is not None for e in request.study.stages))
    scale = fit_scale(several[0], limit - starts, session.pool.size, several[1])
    if scale < 1.0:
        session.note(f"every run is given {scale:.2g} of the recipe's tokens, so that the plan fits {limit:.0f} s")
        plan = make_plan(request, session.materials, scale, session.find)
    return plan


def foreseen(request: Request, out: str | Path, session: Session) -> tuple[Plan, list[Trial]]:
    """The plan that `run_study` would follow, and its trials that the folder has no Result for. Nothing is changed."""
    folder = Folder(out)
    held = folder.held()
    plan = planned(request, session, held=held.get("scale") if held else None)
    if held is not None:
        folder.check(held, plan.digest, {"study": request.name, "budget": request.budget})
    return plan, folder.left(plan.trials)


def _most_seeds(plan: Plan) -> int:
    return len({trial.seed for trial in plan.trials})


def run_study(request: Request, out: str | Path, session: Session, seconds: float | None = None) -> Finished:
    """Run a study into the folder `out`, or go on with it there. Ctrl-C stops it after concluding from what there is.

    Raises ValueError for what the user can mend: a folder in use, another study's folder, a plan that fits no budget.
    """
    with Folder(out) as folder:
        held = folder.held()
        plan = planned(request, session, seconds, held.get("scale") if held else None)
        folder.bind(plan.digest, {"study": request.name, "budget": request.budget, "scale": plan.scale})
        known = session.environment()
        session = replace(session, environment=lambda: known)
        try:
            plan, failed = _run_plan(
                lambda rates: make_plan(request, session.materials, plan.scale, session.find, rates), folder, session
            )
        except KeyboardInterrupt:
            _conclude(plan, (), folder, session)
            raise
        _conclude(plan, (), folder, session)
        syntheses, extra_failed = _synthesise_all(request, plan, folder, session)
        results = _conclude(plan, syntheses, folder, session)
        return Finished(plan, (*failed, *extra_failed), tuple(results))


def _run_plan(made: Callable[[Rates], Plan], folder: Folder, session: Session) -> tuple[Plan, list[Failed]]:
    """Run a plan; stages that tune run their sweeps first, and are planned again with what these found."""
    plan = made({})
    failed = _run(part(plan.trials, plan.waiting, later=False), folder, session)
    if plan.waiting:
        results = folder.read()
        plan = made({stage.name: best_rates(results, stage) for stage in plan.stages if stage.tunes})
        failed += _run(part(plan.trials, plan.waiting, later=True), folder, session)
    return plan, failed


def _run(trials: Sequence[Trial], folder: Folder, session: Session) -> list[Failed]:
    left = folder.adopt(trials)
    watching = session.watch(left) if session.watch else nullcontext(None)
    with watching as watcher:
        return session.runner(left, folder, session.pool, watcher)


@dataclass(frozen=True)
class _Chosen:
    name: str
    stage: Stage
    synthesis: Synthesis
    checkpoint: Path | None = None


def _synthesise_all(
    request: Request, plan: Plan, folder: Folder, session: Session
) -> tuple[list[_Chosen], list[Failed]]:
    chosen, failed = [], []
    for entry in request.study.stages:
        if entry.synthesis is None:
            continue
        like = stage_like(entry, plan.stages)
        try:
            found = synthesise(folder.read(), entry.synthesis.constraints, _counted(like, session))
        except ValueError as error:
            # The stages' own results stand: they must not be lost to a constraint that nothing meets.
            session.note(f"{entry.name}: {error}")
            continue
        made = synthesis_plan(entry.name, like, found.changes, entry.synthesis, session.materials, plan)
        trained, lost = _run_plan(made, folder, session)
        failed += lost
        kept = next(folder.checkpoint(trial) for trial in trained.trials if trial.keep)
        chosen.append(_Chosen(entry.name, trained.stages[0], found, kept if kept.exists() else None))
    return chosen, failed


def _counted(like: Stage, session: Session) -> Callable[[dict[str, Any]], dict[str, float]] | None:
    sizes = session.materials.sizes
    if sizes is None:
        return None
    return lambda changes: dict(sizes(session.materials.model(like.study.base, changes)[0]))


def _conclude(plan: Plan, chosen: Sequence[_Chosen], folder: Folder, session: Session) -> list[Result]:
    """Every line that is not a run's, written afresh: environment, studies, verdicts, claims, syntheses."""
    runs = folder.read()
    about = Result(kind="environment", study=plan.name, values=session.environment(), **_origin(session))
    derived = [about] if about.values else []
    if any(stage.name != plan.name for stage in plan.stages):
        derived.append(frame_line(plan, about, session.command))
    for stage in plan.stages:
        derived += _judged(stage, plan, runs, about, session)
    for found in chosen:
        derived += _synthesis_lines(found, plan, runs, about, session)
    folder.rewrite(derived)
    return folder.read()


def _judged(stage: Stage, plan: Plan, runs: Sequence[Result], about: Result, session: Session) -> list[Result]:
    line = study_line(stage, plan, about, session.command)
    if said := note(runs, stage):
        line = line.model_copy(update={"values": {**line.values, "note": said}})
    evidence = Evidence(runs, stage.name)
    claims = [claim.model_dump() for claim in stage.study.claims]
    return [
        line,
        *sweep_results(runs, stage, line),
        *verdict_results(evidence, stage.court, line),
        *claim_results(evidence, stage.court, claims, line),
    ]


def frame_line(plan: Plan, about: Result, command: str) -> Result:
    """The title and question of a study of studies, which has no arms of its own."""
    values = {"title": plan.title or plan.name, "question": plan.question, "budget": plan.budget, "command": command}
    return about.model_copy(update={"kind": "study", "study": plan.name, "values": {**values, "arms": []}})


def study_line(stage: Stage, plan: Plan, about: Result, command: str) -> Result:
    """What a reader, the report or a synthesis needs to know of a stage."""
    study, court = stage.study, stage.court
    values = {
        "title": study.title,
        "question": study.question,
        "budget": plan.budget,
        "base": to_yaml(stage.base),
        "recipe": to_yaml(stage.recipe),
        "base_arm": court.base_arm,
        "arms": [
            {
                "name": arm,
                "title": study.all_arms[arm].title or arm,
                "changes": stage.changes(arm),
                "spec_digest": stage.models[arm][1],
            }
            for arm in stage.arms
        ],
        "claims": [{"id": c.id, "text": c.text, "source": c.source} for c in study.claims],
        "metric": court.metric.name,
        "lower_is_better": court.metric.lower_is_better,
        "interest": court.metric.interest,
        "alpha": court.alpha,
        "scale": plan.scale,
        "command": command,
    }
    labels = {"kind": "study", "study": stage.name, "recipe_digest": stage.recipe_digest, "values": values}
    return about.model_copy(update=labels)


def _synthesis_lines(
    found: _Chosen, plan: Plan, runs: Sequence[Result], about: Result, session: Session
) -> list[Result]:
    name, stage, synthesis = found.name, found.stage, found.synthesis
    trained = bool(synthesis.changes)
    table = comparison_table(Evidence(runs, name), stage.court, CHOSEN) if trained else []
    spec = stage.models[CHOSEN][0] if trained else stage.base
    values = {
        "constraints": synthesis.constraints,
        "choices": [
            {"study": c.study, "arm": c.arm, "reason": c.reason, "supported": c.supported} for c in synthesis.choices
        ],
        "changes": synthesis.changes,
        "spec": to_yaml(spec),
        "table": table,
        "checkpoint": found.checkpoint.name if found.checkpoint else None,
    }
    labels = {"kind": "synthesis", "study": name, "recipe_digest": stage.recipe_digest, "values": values}
    return [*_judged(stage, plan, runs, about, session), about.model_copy(update=labels)]


def _origin(session: Session) -> dict[str, Any]:
    return {"version": __version__, "commit": commit(), "device": session.device, "threads": session.pool.threads}


def commit() -> str | None:
    """The commit of the checkout this package runs from; None for an installed one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None

"""From a study and a budget to stages and trials: every run that is wanted, once, however many stages share it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from assay.study.match import matched
from assay.study.spec import BudgetSpec, OnlySpec, StageSpec, StudySpec, SynthesisSpec, load_study
from assay.study.trials import Materials, Stage, Tree, Trial, all_trials, main_trials, shared, sweep_trials

BUDGETS = ("smoke", "quick", "full")
TOKEN_STEP = 1024
BASELINE, CHOSEN = "baseline", "chosen"
Rates = Mapping[str, Mapping[str, float]]
"""stage -> arm -> learning rate, where a sweep has found it."""


@dataclass(frozen=True)
class Plan:
    name: str
    budget: str
    stages: tuple[Stage, ...]
    trials: tuple[Trial, ...]
    scale: float = 1.0
    title: str = ""
    question: str = ""

    @cached_property
    def digest(self) -> str:
        """16 hex digits over every trial and where it is used."""
        lines = [[*t.key, [[u.study, u.arm, u.sweeps] for u in t.uses], t.measurements] for t in self.trials]
        return _digest(sorted(lines, key=lambda line: json.dumps(line, sort_keys=True)))

    @property
    def waiting(self) -> frozenset[str]:
        """The stages whose arms wait for their learning rates."""
        return frozenset(stage.name for stage in self.stages if stage.tunes)


@dataclass(frozen=True)
class Request:
    """What the user asked for. `overrides` are dotted, from `model.` or `recipe.`, and apply to every stage."""

    name: str
    study: StudySpec
    budget: str = "quick"
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        return _digest([self.name, self.study.model_dump(mode="json"), self.budget, dict(self.overrides)])


def make_plan(
    request: Request,
    materials: Materials,
    scale: float = 1.0,
    find: Callable[[str], tuple[str, StudySpec]] = load_study,
    rates: Rates | None = None,
) -> Plan:
    """Expand every stage but a synthesis, which is planned from the others' results. `scale` multiplies all tokens.

    rates: what the sweeps found; without them, stages that tune are planned with the recipe's own rate.
    """
    study = request.study
    if request.budget not in BUDGETS:
        raise ValueError(f"budget {request.budget!r}; accepted: {', '.join(BUDGETS)}")
    for path in request.overrides:
        if path.partition(".")[0] not in ("model", "recipe") or "." not in path:
            raise ValueError(f"{path}: an override is a path from model. or recipe., such as recipe.tokens=8192")
    outer = study.budgets.get(request.budget, BudgetSpec())
    stages = []
    for name, inner, budget, overrides in _entries(request, outer, find):
        stage = _stage(name, inner, budget, overrides, materials, scale)
        stages.append(replace(stage, rates=(rates or {}).get(name, {})))
    extra = {stage_like(e, stages).name: e.synthesis.measurements for e in study.stages if e.synthesis is not None}
    found = [trial for stage in stages for trial in all_trials(stage, extra.get(stage.name, ()))]
    return Plan(request.name, request.budget, tuple(stages), shared(found), scale, study.title, study.question)


def _entries(
    request: Request, outer: BudgetSpec, find: Callable[[str], tuple[str, StudySpec]]
) -> list[tuple[str, StudySpec, BudgetSpec, Mapping[str, Any]]]:
    """Name, study, budget and overrides of every stage that is a study."""
    study = request.study
    if not study.stages:
        return [(request.name, study, outer, request.overrides)]
    found: list[tuple[str, StudySpec, BudgetSpec, Mapping[str, Any]]] = []
    for entry in study.stages:
        if entry.name == request.name:
            raise ValueError(f"stage {entry.name!r} has the name of the study itself; give it another")
        if entry.study is None:
            continue
        inner = find(entry.study)[1]
        if inner.stages:
            raise ValueError(f"stage {entry.name!r}: {entry.study} has stages itself; one level is accepted")
        budget = _merged(inner.budgets.get(request.budget, BudgetSpec()), outer)
        found.append((entry.name, inner, budget, {**entry.overrides, **request.overrides}))
    return found


def stage_like(entry: StageSpec, stages: Sequence[Stage]) -> Stage:
    """The stage that a synthesis is trained like."""
    assert entry.synthesis is not None
    wanted, named = entry.synthesis.like, {stage.name: stage for stage in stages}
    if not named or (wanted is not None and wanted not in named):
        raise ValueError(
            f"{entry.name}: synthesis.like is {wanted!r}; accepted: {', '.join(named) or 'no stage is there'}"
        )
    found = stages[0] if wanted is None else named[wanted]
    if twice := {m.name for m in entry.synthesis.measurements} & {m.name for m in found.study.measurements}:
        raise ValueError(f"{entry.name}: synthesis.measurements: {min(twice)} is measured by {found.name} already")
    return found


def synthesis_plan(
    name: str, like: Stage, changes: Mapping[str, Any], asked: SynthesisSpec, materials: Materials, plan: Plan
) -> Callable[[Rates], Plan]:
    """The chosen configuration beside the baseline, with the base, recipe, seeds and measurements of another stage.

    Without changes the baseline stands alone. The first run of what was chosen keeps its model. Given rates -> plan.
    """
    given, base_arm = like.study, like.study.base_arm
    mine = [m for m in given.measurements if m.only.arms is None or base_arm in m.only.arms]
    measured = [m.model_copy(update={"only": OnlySpec(seeds=m.only.seeds)}) for m in (*mine, *asked.measurements)]
    study = StudySpec.model_validate(
        {
            "title": "Synthesis",
            "question": "Do the choices that won one by one hold together?",
            "base": given.base,
            "recipe": given.recipe,
            "metric": given.metric,
            "arms": {BASELINE: {"role": given.all_arms[base_arm].role}}
            | ({CHOSEN: {"changes": dict(changes)}} if changes else {}),
            "seeds": given.seeds,
            "measurements": measured,
        }
    )
    named = like.budget.measurements
    if named is not None:
        named = (*named, *(m.name for m in asked.measurements))
    sweep = like.budget.sweep if like.tunes else None
    budget = like.budget.model_copy(update={"arms": None, "measurements": named, "sweep": sweep})
    stage = _stage(name, study, budget, like.overrides, materials, plan.scale)

    def made(rates: Rates) -> Plan:
        tuned = replace(stage, rates=rates.get(name, {}))
        trials = list(main_trials(tuned))
        first = next(i for i, trial in enumerate(trials) if trial.uses[0].arm == (CHOSEN if changes else BASELINE))
        trials[first] = replace(trials[first], keep=True)
        return Plan(name, plan.budget, (tuned,), shared([*sweep_trials(tuned), *trials]), plan.scale)

    return made


def _merged(inner: BudgetSpec, outer: BudgetSpec) -> BudgetSpec:
    """The stage's own budget, and what the study of studies says on top."""
    said = {name: getattr(outer, name) for name in outer.model_fields_set if name != "overrides"}
    return inner.model_copy(update={**said, "overrides": {**inner.overrides, **outer.overrides}})


def _stage(
    name: str, study: StudySpec, budget: BudgetSpec, overrides: Mapping[str, Any], materials: Materials, scale: float
) -> Stage:
    changes = {**budget.overrides, **overrides}
    model_changes, recipe_changes = (
        {path: value for path, value in changes.items() if path.startswith(root)} for root in ("model.", "recipe.")
    )
    recipe, recipe_digest = materials.recipe(study.recipe, recipe_changes)
    if scale != 1.0:
        recipe_changes["recipe.tokens"] = _scaled(recipe["tokens"], scale)
        recipe, recipe_digest = materials.recipe(study.recipe, recipe_changes)
    arms = [arm for arm in study.all_arms if budget.arms is None or arm in budget.arms or arm == study.base_arm]
    models: dict[str, tuple[Tree, str]] = {}
    tuned: dict[str, int] = {}
    recipes: dict[str, Tree] = {}
    for arm in arms:
        own, taught = {**model_changes, **study.all_arms[arm].on("model")}, study.all_arms[arm].on("recipe")
        if study.match is not None and models:
            unmatched = _named(materials.model, study.base, own, f"{name}: arm {arm}")
            tuned[arm] = matched(study.match, models[study.base_arm][0], study.base, own, materials)
            own[study.match.tune] = tuned[arm]
        models[arm] = _named(materials.model, study.base, own, f"{name}: arm {arm}")
        if arm in tuned and models[arm] == unmatched:
            del tuned[arm]
        if taught:
            recipes[arm], digest = _named(materials.recipe, study.recipe, recipe_changes | taught, f"{name}: arm {arm}")
            models[arm] = models[arm][0], _digest([models[arm][1], digest])
        same = next((a for a in models if a != arm and models[a][1] == models[arm][1]), None)
        if same is not None:
            raise ValueError(
                f"{name}: arms {same} and {arm} are the same model ({models[arm][1]}); give them different changes"
            )
    base = models[study.base_arm][0]
    tokens = {arm: _tokens(recipe["tokens"], tree, materials) for arm, (tree, _) in models.items()}
    resolved = (base, recipe, recipe_digest, models, tokens, tuned)
    return Stage(name, study, tuple(arms), *resolved, budget, overrides, recipes=recipes)


def _scaled(tokens: Any, scale: float) -> Any:
    if isinstance(tokens, dict):
        return {"per_param": tokens["per_param"] * scale}
    return max(TOKEN_STEP, int(tokens * scale) // TOKEN_STEP * TOKEN_STEP)


def _tokens(tokens: Any, model: Tree, materials: Materials) -> int:
    """What a recipe's `tokens` means for this model: a number, or so many for each parameter."""
    if not isinstance(tokens, dict):
        return int(tokens)
    if materials.sizes is None:
        raise ValueError("recipe.tokens: per_param needs the model's parameters counted")
    return int(tokens["per_param"] * materials.sizes(model)["params"])


def _named(
    made: Callable[[Any, Mapping[str, Any]], tuple[Tree, str]], source: Any, changes: Tree, where: str
) -> tuple[Tree, str]:
    """A model or recipe with its digest. ValueError that says whose it is."""
    try:
        return made(source, changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

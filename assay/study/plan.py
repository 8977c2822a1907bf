"""From a study and a budget to trials: one run of one model under one recipe with one seed, each run once."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from assay.study.evidence import lower_is_better
from assay.study.judge import Court
from assay.study.match import matched
from assay.study.spec import BudgetSpec, StudySpec, load_study
from assay.study.statistics import Metric

Tree = dict[str, Any]
BUDGETS = ("smoke", "quick", "full")
TRIAL_OVERHEAD_S = 0.5
TOKEN_STEP = 1024


@dataclass(frozen=True)
class Materials:
    """How models and recipes become trees with digests; injected, so that a plan needs no tensors.

    model(source, changes) and recipe(source, changes) -> (every field, digest); changes are dotted, from `model.` or
    `recipe.`. sizes(model) -> {params, active_flops, state_bytes}. rate(model, recipe) -> tokens/s of one worker.
    """

    model: Callable[[Any, Mapping[str, Any]], tuple[Tree, str]]
    recipe: Callable[[Any, Mapping[str, Any]], tuple[Tree, str]]
    sizes: Callable[[Tree], Mapping[str, float]] | None = None
    rate: Callable[[Tree, Tree], float] | None = None


@dataclass(frozen=True)
class Use:
    """Where a trial's results appear: stages share runs. `measurements` are those that this stage asked for."""

    study: str
    arm: str
    measurements: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    spec: Tree
    recipe: Tree
    spec_digest: str
    recipe_digest: str
    seed: int
    uses: tuple[Use, ...]
    tokens: int
    measurements: tuple[tuple[str, Tree], ...] = ()
    keep: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        return self.spec_digest, self.recipe_digest, self.seed

    @property
    def name(self) -> str:
        return f"{self.uses[0].study}/{self.uses[0].arm} seed {self.seed}"

    def job(self) -> Tree:
        """What a worker is handed: plain data."""
        return {
            "study": self.uses[0].study,
            "arm": self.uses[0].arm,
            "seed": self.seed,
            "spec": self.spec,
            "recipe": self.recipe,
            "spec_digest": self.spec_digest,
            "recipe_digest": self.recipe_digest,
            "measurements": [{"name": name, "options": options} for name, options in self.measurements],
        }


@dataclass(frozen=True)
class Stage:
    """One study of the plan, resolved: what the report is told and what verdicts and claims go by."""

    name: str
    study: StudySpec
    arms: tuple[str, ...]
    base: Tree
    recipe: Tree
    recipe_digest: str
    models: Mapping[str, tuple[Tree, str]]
    tokens: Mapping[str, int]
    tuned: Mapping[str, int] = field(default_factory=dict)
    budget: BudgetSpec = field(default_factory=BudgetSpec)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def court(self) -> Court:
        asked = self.study.metric
        lower = lower_is_better(asked.name) if asked.better is None else asked.better == "lower"
        metric = Metric(asked.name, lower, asked.interest)
        return Court(self.study.base_arm, self.arms, metric, asked.alpha)

    def changes(self, arm: str) -> Tree:
        """The arm's dotted changes, with what matching tuned."""
        out = dict(self.study.all_arms[arm].changes)
        if arm in self.tuned and self.study.match:
            out[self.study.match.tune] = self.tuned[arm]
        return out


@dataclass(frozen=True)
class Plan:
    name: str
    budget: str
    stages: tuple[Stage, ...]
    trials: tuple[Trial, ...]
    scale: float = 1.0
    notes: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """16 hex digits over every trial and where it is used."""
        lines = [[*t.key, [[u.study, u.arm] for u in t.uses], t.measurements] for t in self.trials]
        return _digest(sorted(lines, key=lambda line: json.dumps(line, sort_keys=True)))


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
) -> Plan:
    """Expand every stage but a synthesis, which is planned from the others' results. `scale` multiplies all tokens."""
    study = request.study
    if request.budget not in BUDGETS:
        raise ValueError(f"budget {request.budget!r}; accepted: {', '.join(BUDGETS)}")
    for path in request.overrides:
        if path.partition(".")[0] not in ("model", "recipe") or "." not in path:
            raise ValueError(f"{path}: an override is a path from model. or recipe., such as recipe.tokens=8192")
    outer = study.budgets.get(request.budget, BudgetSpec())
    if not study.stages:
        stages = [_stage(request.name, study, outer, request.overrides, materials, scale)]
        budgets = [outer]
    else:
        stages, budgets = [], []
        for entry in study.stages:
            if entry.study is not None:
                inner = find(entry.study)[1]
                if inner.stages:
                    raise ValueError(f"stage {entry.name!r}: {entry.study} has stages itself; one level is accepted")
                budget = _merged(inner.budgets.get(request.budget, BudgetSpec()), outer)
                overrides = {**entry.overrides, **request.overrides}
                stages.append(_stage(entry.name, inner, budget, overrides, materials, scale))
                budgets.append(budget)
    found = [t for stage, budget in zip(stages, budgets) for t in _trials(stage, budget)]
    return Plan(request.name, request.budget, tuple(stages), _shared(found), scale)


def synthesis_stage(
    name: str, like: Stage, changes: Mapping[str, Any], materials: Materials, scale: float
) -> tuple[Stage, tuple[Trial, ...]]:
    """The chosen configuration beside the baseline, with the base, recipe, seeds and measurements of another stage.

    The first run of the chosen configuration keeps its checkpoint.
    """
    given = like.study
    study = StudySpec.model_validate(
        {
            "title": "Synthesis",
            "question": "Do the choices that won one by one hold together?",
            "base": given.base,
            "recipe": given.recipe,
            "metric": given.metric,
            "arms": {"baseline": {}, "chosen": {"changes": dict(changes)}},
            "seeds": given.seeds,
            "measurements": given.measurements,
        }
    )
    budget = like.budget.model_copy(update={"arms": None})
    stage = _stage(name, study, budget, like.overrides, materials, scale)
    trials = list(_trials(stage, budget))
    first = next(i for i, trial in enumerate(trials) if trial.uses[0].arm == "chosen")
    trials[first] = replace(trials[first], keep=True)
    return stage, tuple(trials)


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
        scaled = {**recipe_changes, "recipe.tokens": _scaled(recipe["tokens"], scale)}
        recipe, recipe_digest = materials.recipe(study.recipe, scaled)
    arms = [arm for arm in study.all_arms if budget.arms is None or arm in budget.arms or arm == study.base_arm]
    models: dict[str, tuple[Tree, str]] = {}
    tuned: dict[str, int] = {}
    for arm in arms:
        own = {**model_changes, **study.all_arms[arm].changes}
        if study.match is not None and models:
            tuned[arm] = matched(study.match, models[study.base_arm][0], study.base, own, materials)
            own[study.match.tune] = tuned[arm]
        models[arm] = _built(materials, study, own, f"{name}: arm {arm}")
        same = next((a for a in models if a != arm and models[a][1] == models[arm][1]), None)
        if same is not None:
            raise ValueError(
                f"{name}: arms {same} and {arm} are the same model ({models[arm][1]}); give them different changes"
            )
    base = models[study.base_arm][0]
    tokens = {arm: _tokens(recipe["tokens"], tree, materials) for arm, (tree, _) in models.items()}
    resolved = (base, recipe, recipe_digest, models, tokens, tuned)
    return Stage(name, study, tuple(arms), *resolved, budget, overrides)


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


def _built(materials: Materials, study: StudySpec, changes: Tree, where: str) -> tuple[Tree, str]:
    try:
        return materials.model(study.base, changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _trials(stage: Stage, budget: BudgetSpec) -> Iterator[Trial]:
    """Seed by seed, the base arm first, so that a study that is cut short has something to say about every arm."""
    study = stage.study
    asked = [m for m in study.measurements if budget.measurements is None or m.name in budget.measurements]
    seeds = {arm: budget.seeds_for(study.all_arms[arm].role, study.seeds) for arm in stage.arms}
    for i in range(max(map(len, seeds.values()))):
        for arm in stage.arms:
            if i < len(seeds[arm]):
                tree, digest = stage.models[arm]
                made = [m for m in asked if m.applies(arm, i)]
                use = Use(stage.name, arm, tuple(m.name for m in made))
                measurements = tuple((m.name, m.options) for m in made)
                tokens = stage.tokens[arm]
                yield Trial(
                    tree, stage.recipe, digest, stage.recipe_digest, seeds[arm][i], (use,), tokens, measurements
                )


def _shared(trials: list[Trial]) -> tuple[Trial, ...]:
    """Equal runs become one with several uses and all the measurements asked of it."""
    out: dict[tuple[str, str, int], Trial] = {}
    for trial in trials:
        first = out.get(trial.key)
        if first is None:
            out[trial.key] = trial
            continue
        wanted = dict(first.measurements)
        for name, options in trial.measurements:
            if wanted.setdefault(name, options) != options:
                raise ValueError(
                    f"{first.name} and {trial.name} are one run, and {name} is asked of it with two sets of options: "
                    f"{wanted[name]} and {options}"
                )
        out[trial.key] = replace(first, uses=first.uses + trial.uses, measurements=tuple(wanted.items()))
    return tuple(out.values())


def expected_seconds(plan: Plan, materials: Materials) -> list[float]:
    """For each trial, from the injected rate, asked once for each model and recipe."""
    if materials.rate is None:
        raise ValueError("no rate was measured: expected times are unknown")
    rates: dict[tuple[str, str], float] = {}
    out = []
    for trial in plan.trials:
        if trial.key[:2] not in rates:
            rates[trial.key[:2]] = materials.rate(trial.spec, trial.recipe)
        out.append(trial.tokens / rates[trial.key[:2]] + TRIAL_OVERHEAD_S)
    return out


def wall_seconds(seconds: list[float], workers: int) -> float:
    """When the last trial ends if each worker takes the next trial in order."""
    free = [0.0] * max(1, min(workers, len(seconds) or 1))
    for s in seconds:
        heapq.heapreplace(free, free[0] + s)
    return max(free)


def fit_scale(seconds: list[float], limit: float, workers: int) -> float:
    """The factor, at most 1, on every trial's tokens that fits `seconds` into `limit`; never one arm alone."""
    if wall_seconds(seconds, workers) <= limit:
        return 1.0
    fixed = [TRIAL_OVERHEAD_S] * len(seconds)
    if wall_seconds(fixed, workers) >= limit:
        raise ValueError(
            f"{len(seconds)} trials on {workers} workers need more than {limit:.0f} s before any token is trained; "
            "take fewer seeds or arms, or a larger budget"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        scaled = [TRIAL_OVERHEAD_S + (s - TRIAL_OVERHEAD_S) * middle for s in seconds]
        low, high = (middle, high) if wall_seconds(scaled, workers) <= limit else (low, middle)
    # Two digits: a plan that is asked for again must not differ by the noise of its measured rate.
    return max(float(f"{low:.2g}"), 1e-6)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

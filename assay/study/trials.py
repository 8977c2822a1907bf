"""What a study is planned into: stages, and trials, each one run of one model under one recipe with one seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from assay.spec.load import apply_changes
from assay.study.evidence import lower_is_better
from assay.study.judge import Court
from assay.study.spec import BudgetSpec, MeasurementSpec, StudySpec, SweepSpec
from assay.study.statistics import Metric

Tree = dict[str, Any]
RATE = "recipe.optimizer.lr"


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
    """Where a trial's results appear: stages share runs. `measurements` are those that this stage asked for.

    sweeps: it is a point of the stage's learning-rate sweep, and gives a `sweep` line in place of a `trial` line.
    """

    study: str
    arm: str
    measurements: tuple[str, ...] = ()
    sweeps: bool = False


@dataclass(frozen=True)
class Trial:
    """`recipe` has the run's own learning rate; `recipe_digest` is that of the stage's recipe, which may have another.

    keep: the trained model is saved.
    """

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
    def rate(self) -> float:
        """The learning rate, as recipe.optimizer.lr."""
        return _rate(self.recipe)

    @property
    def key(self) -> tuple[str, str, int, float]:
        return self.spec_digest, self.recipe_digest, self.seed, self.rate

    @property
    def name(self) -> str:
        first = self.uses[0]
        return f"{first.study}/{first.arm} seed {self.seed}" + (f", rate {self.rate:g}" if first.sweeps else "")

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

    def used(self, wanted: Callable[[Use], bool]) -> Trial | None:
        """The trial for some of its uses, with what these measure; None where it has none of them."""
        uses = tuple(use for use in self.uses if wanted(use))
        names = {name for use in uses for name in use.measurements}
        asked = tuple((name, options) for name, options in self.measurements if name in names)
        return replace(self, uses=uses, measurements=asked) if uses else None


@dataclass(frozen=True)
class Stage:
    """One study of the plan, resolved: what the report is told and what verdicts and claims go by.

    rates: the arms' own learning rates, where a sweep has tuned them. recipes: of arms that change it. The digest of
    such an arm's spec is over both, so that the recipe's stays that of the stage: all else is the same for all arms.
    """

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
    rates: Mapping[str, float] = field(default_factory=dict)
    recipes: Mapping[str, Tree] = field(default_factory=dict)

    @property
    def court(self) -> Court:
        asked = self.study.metric
        lower = lower_is_better(asked.name) if asked.better is None else asked.better == "lower"
        metric = Metric(asked.name, lower, asked.interest)
        return Court(self.study.base_arm, self.arms, metric, asked.alpha)

    @property
    def rate(self) -> float:
        """The recipe's own learning rate."""
        return _rate(self.recipe)

    def own_rate(self, arm: str) -> float:
        """The arm's learning rate: what its sweep found, or what its recipe says."""
        return self.rates.get(arm, _rate(self.recipes.get(arm, self.recipe)))

    def swept(self, arm: str, rate: float) -> float:
        """A rate of the sweep, for an arm whose recipe has another rate in proportion."""
        return rate * _rate(self.recipes[arm]) / self.rate if arm in self.recipes else rate

    @property
    def sweep(self) -> SweepSpec | None:
        return self.budget.sweep

    @property
    def tunes(self) -> bool:
        """Whether its arms wait for their rates from its own sweep."""
        return self.sweep is not None and self.sweep.tune

    def changes(self, arm: str) -> Tree:
        """The arm's dotted changes, with what matching tuned."""
        out = dict(self.study.all_arms[arm].changes)
        if arm in self.tuned and self.study.match:
            out[self.study.match.tune] = self.tuned[arm]
        return out

    def seeds(self, arm: str) -> tuple[int, ...]:
        return self.budget.seeds_for(self.study.all_arms[arm].role, self.study.seeds)

    def trial(self, arm: str, seed: int, rate: float, use: Use, asked: Iterable[MeasurementSpec] = ()) -> Trial:
        """One run of this stage, for one use."""
        spec, digest = self.models[arm]
        recipe = apply_changes(self.recipes.get(arm, self.recipe), {RATE.removeprefix("recipe."): rate})
        made = tuple((name, m.options) for m in asked for name in m.names)
        return Trial(spec, recipe, digest, self.recipe_digest, seed, (use,), self.tokens[arm], made)


def _rate(recipe: Tree) -> float:
    return float(recipe["optimizer"]["lr"])


def main_trials(stage: Stage, extra: Sequence[MeasurementSpec] = ()) -> Iterator[Trial]:
    """Seed by seed, the base arm first, so that a study that is cut short has something to say about every arm.

    `extra` is measured on the base arm besides what the stage asks for.
    """
    named = stage.budget.measurements
    asked = [m for m in stage.study.measurements if named is None or m.name in named]
    for place in range(max(len(stage.seeds(arm)) for arm in stage.arms)):
        for arm in stage.arms:
            if place >= len(seeds := stage.seeds(arm)):
                continue
            wanted = [*asked, *(extra if arm == stage.study.base_arm else ())]
            made = [m for m in wanted if m.applies(arm, place)]
            use = Use(stage.name, arm, tuple(name for m in made for name in m.names))
            yield stage.trial(arm, seeds[place], stage.own_rate(arm), use, made)


def sweep_trials(stage: Stage) -> Iterator[Trial]:
    """Every rate for every arm that the budget's sweep names, rate by rate; nothing is measured on them."""
    if stage.sweep is None:
        return
    for rate in stage.sweep.rates:
        for arm in stage.arms:
            if stage.sweep.arms is None or arm in stage.sweep.arms:
                for seed in stage.seeds(arm)[: stage.sweep.seeds]:
                    yield stage.trial(arm, seed, stage.swept(arm, rate), Use(stage.name, arm, sweeps=True))


def all_trials(stage: Stage, extra: Sequence[MeasurementSpec] = ()) -> list[Trial]:
    """Main runs and sweep; the sweep first where the main runs wait for it."""
    main, swept = list(main_trials(stage, extra)), list(sweep_trials(stage))
    return swept + main if stage.tunes else main + swept


def shared(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Equal runs become one with several uses and all the measurements asked of it."""
    out: dict[tuple[str, str, int, float], Trial] = {}
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
        uses, kept = first.uses + trial.uses, first.keep or trial.keep
        out[trial.key] = replace(first, uses=uses, measurements=tuple(wanted.items()), keep=kept)
    return tuple(out.values())


def part(trials: Iterable[Trial], waiting: Collection[str], later: bool) -> list[Trial]:
    """What can run at once (False), or what waits for the sweep of its stage: the main runs of the `waiting` ones."""
    found = (t.used(lambda use: (use.study in waiting and not use.sweeps) == later) for t in trials)
    return [trial for trial in found if trial is not None]

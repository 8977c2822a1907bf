"""Group Results into stages and arms. The last line of a kind wins, since a resumed run may write one again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from assay.report.words import number
from assay.spec.result import Result

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One arm of one stage: its runs, one per seed, and the rows of its measurements, each with its seed."""

    name: str
    title: str
    changes: Mapping[str, Any]
    is_base: bool
    spec_digest: str | None
    trials: tuple[Result, ...] = ()
    rows: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)

    def values(self, key: str) -> list[float]:
        """A trial value over seeds, without what diverged or is missing."""
        return [v for trial in self.trials if (v := number(trial.values.get(key))) is not None]

    def mean(self, key: str) -> float | None:
        found = self.values(key)
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Stage:
    """A study, or one stage of it; `info` is what its study line says."""

    name: str
    info: Mapping[str, Any]
    recipe_digest: str | None
    arms: tuple[Arm, ...]
    verdicts: tuple[Result, ...]
    claims: tuple[Result, ...]
    others: tuple[Result, ...]

    @property
    def title(self) -> str:
        return str(self.info.get("title") or self.name)

    @property
    def metric(self) -> str:
        found = self.info.get("metric") or (self.verdicts[0].values.get("metric") if self.verdicts else None)
        return str(found or "loss_nats")

    @property
    def base(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.is_base), None)

    def of(self, kind: str) -> list[Result]:
        return [result for result in self.others if result.kind == kind]

    def verdict(self, arm: str, metric: str) -> Result | None:
        found = [v for v in self.verdicts if v.arm == arm and v.values.get("metric") == metric]
        return found[-1] if found else None

    @property
    def metrics(self) -> list[str]:
        """The metrics that carry verdicts, the stage's own first."""
        return list(dict.fromkeys([self.metric, *(str(v.values.get("metric")) for v in self.verdicts)]))

    @property
    def has_content(self) -> bool:
        return bool(self.arms or self.verdicts or self.claims or self.others)


def stages_of(results: Iterable[Result]) -> list[Stage]:
    """Stages in the order of their first line. ValueError when one of them mixes two recipes."""
    every = list(results)
    names = list(dict.fromkeys(result.study for result in every if result.kind != "environment"))
    return [_stage(name, every) for name in names]


def _stage(name: str, every: list[Result]) -> Stage:
    own = [result for result in every if result.study == name]
    recipe = _one_recipe(name, own)
    info = next((r.values for r in reversed(own) if r.kind == "study"), {})
    verdicts = _last([r for r in own if r.kind == "verdict"], lambda r: (r.arm, r.values.get("metric")))
    claims = _last([r for r in own if r.kind == "claim"], lambda r: r.values.get("id"))
    others = [r for r in own if r.kind in ("failure", "sweep", "synthesis")]
    others = _last(others, lambda r: (r.kind, r.arm, r.seed, str(r.values) if r.kind == "failure" else None))
    arms = tuple(_arm(declared, recipe, own, every) for declared in _declared(info, own, verdicts))
    return Stage(name, info, recipe, arms, tuple(verdicts), tuple(claims), tuple(others))


def _one_recipe(name: str, own: list[Result]) -> str | None:
    digests = list(dict.fromkeys(r.recipe_digest for r in own if r.recipe_digest))
    if len(digests) > 1:
        raise ValueError(
            f"{name}: results of two recipes cannot stand in one table: recipe_digest {digests[0]} and {digests[1]}; "
            "run the study again in a new folder, or leave one of them out"
        )
    return digests[0] if digests else None


def _last(results: list[Result], key: Any) -> list[Result]:
    return list({key(result): result for result in results}.values())


def _declared(info: Mapping[str, Any], own: list[Result], verdicts: list[Result]) -> list[Arm]:
    """The arms of the study line, then any others that only results name; the base arm first."""
    entries = {str(a["name"]): a for a in info.get("arms") or [] if isinstance(a, dict) and "name" in a}
    seen = [r.arm for r in own if r.arm is not None and r.kind in ("trial", "measure", "verdict")]
    bases = [info.get("base_arm"), *(v.values.get("base_arm") for v in verdicts)]
    base = next((str(b) for b in bases if b), None)
    names = list(dict.fromkeys([*([base] if base in {*entries, *seen} else []), *entries, *seen]))
    arms = []
    for name in names:
        entry = entries.get(str(name), {})
        changes = entry.get("changes")
        digest = entry.get("spec_digest") or next((r.spec_digest for r in own if r.arm == name and r.spec_digest), None)
        title = str(entry.get("title") or name)
        arms.append(Arm(str(name), title, changes if isinstance(changes, dict) else {}, name == base, digest))
    return arms


def _arm(arm: Arm, recipe: str | None, own: list[Result], every: list[Result]) -> Arm:
    """With its runs: its own, or those of an equal spec under the same recipe, since a run is never repeated."""
    mine = [r for r in own if r.arm == arm.name]
    if not any(r.kind == "trial" for r in mine) and arm.spec_digest and recipe:
        mine += [r for r in every if r.spec_digest == arm.spec_digest and r.recipe_digest == recipe and r not in mine]
    trials = _last([r for r in mine if r.kind == "trial"], lambda r: r.seed)
    measures = _last([r for r in mine if r.kind == "measure"], lambda r: (r.seed, r.values["what"]))
    rows: dict[str, tuple[Row, ...]] = {}
    for measure in measures:
        what = str(measure.values["what"])
        own_rows: Any = measure.values["rows"]
        rows[what] = (*rows.get(what, ()), *({"seed": measure.seed, **row} for row in own_rows))
    return Arm(arm.name, arm.title, arm.changes, arm.is_base, arm.spec_digest, tuple(trials), rows)


@dataclass(frozen=True)
class Point:
    """One place of a curve over seeds: mean, smallest, largest, how many."""

    x: float
    mean: float
    low: float
    high: float
    n: int


def over_seeds(rows: Iterable[Row], x: str, y: str) -> list[Point]:
    """Rows of all seeds grouped by x, in the order of x; rows without a finite x and y are left out."""
    groups: dict[float, list[float]] = {}
    for row in rows:
        at, value = number(row.get(x)), number(row.get(y))
        if at is not None and value is not None:
            groups.setdefault(at, []).append(value)
    return [Point(at, sum(v) / len(v), min(v), max(v), len(v)) for at, v in sorted(groups.items())]


def over_places(rows: Iterable[Row], x: str, y: str) -> list[Row]:
    """Rows that agree in seed and x as one row with the mean of y: over layers, lengths, or whatever else they tell."""
    groups: dict[tuple[Any, float], list[float]] = {}
    for row in rows:
        at, value = number(row.get(x)), number(row.get(y))
        if at is not None and value is not None:
            groups.setdefault((row.get("seed"), at), []).append(value)
    return [{"seed": seed, x: at, y: sum(v) / len(v)} for (seed, at), v in groups.items()]


def curve_rows(curve: Any, x: str, y: str) -> list[Row]:
    """{x: [...], y: [...]} as rows; anything else has none."""
    if not isinstance(curve, Mapping) or not isinstance(curve.get(x), list) or not isinstance(curve.get(y), list):
        return []
    return [{x: a, y: b} for a, b in zip(curve[x], curve[y], strict=False)]

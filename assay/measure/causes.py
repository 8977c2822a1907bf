"""Likely causes of a difference, by trial: one thing is changed at one place, and the difference vanishes or it stays.

What is tried goes by the names of fields (`eps`, `softcap`, `window`, `act`, ...) and by the shapes of weights, not by
kinds of parts: the mistakes that importers make, and that no error tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, get_args

from torch import Tensor

from assay.hub.load import put
from assay.measure import rotary
from assay.measure.isolate import Place, alone, relative, variant
from assay.model.lm import LM
from assay.ops.activations import Activation
from assay.ops.step import Step
from assay.spec.load import change, dump
from assay.spec.model import ModelSpec

Weights = Mapping[str, Tensor]
EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3)
CAPS = (30.0, 50.0, 20.0, 15.0)
THETAS = (10_000.0, 500_000.0, 1_000_000.0, 100_000.0)
GOLDEN = (math.sqrt(5) - 1) / 2
ROUNDS = 24  # of a golden-section search: a value to four digits
PARTLY = 0.25  # what a first trial leaves at most for a second to be tried on top of it
HELPS = 0.8  # a scan goes on only where a point of its grid takes a fifth of the difference away


@dataclass(frozen=True)
class Trial:
    """A change of the spec (dotted paths) or of the weights. step: where it acts."""

    step: str
    cause: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)

    def and_(self, other: Trial) -> Trial:
        """Both at once, at the step of the first."""
        cause = "; and ".join(cause for cause in (self.cause, other.cause) if cause)
        merged = {**self.changes, **other.changes}, {**self.weights, **other.weights}
        return Trial(self.step or other.step, cause, *merged)


@dataclass(frozen=True)
class Scan:
    """A number of the spec whose right value is searched between the grid's ends."""

    step: str
    paths: tuple[str, ...]
    told: str
    grid: tuple[float, ...]

    def trial(self, value: float) -> Trial:
        return Trial(self.step, f"{self.told}; {value:.3g} fits", dict.fromkeys(self.paths, value))


@dataclass(frozen=True)
class Found:
    """step: where the trial acts. cause: what it changes. error: what is left of the difference with it."""

    step: str
    cause: str
    error: float


class Search:
    """Trials at one place, each judged by the place's output on the reference's input. `told(done)` after each."""

    def __init__(self, model: LM, step: Step, reference: Weights, told: Callable[[int], None] | None = None) -> None:
        self.model, self.step, self.reference, self.told, self.done = model, step, reference, told, 0
        self.plain: tuple[Place, LM] | None = None
        self.base = Trial("", "")

    def find(self, place: Place, error: float, enough: float, numbers: Mapping[str, float]) -> Found | None:
        """The first trial that leaves at most `enough`, and at most a tenth of the difference; else the first two that
        do together, one of them being what helps most alone.

        numbers: the configuration's numbers by key; a value that was overlooked is often among them.
        """
        enough = min(enough, error / 10)
        left, trial = self.round(place, error, enough, numbers)
        if enough < left <= PARTLY * error:
            self.base = trial
            left, trial = self.round(place, left, enough, numbers)
            trial, self.base = self.base.and_(trial), Trial("", "")
        return Found(trial.step, trial.cause, left) if left <= enough else None

    def round(self, place: Place, error: float, enough: float, numbers: Mapping[str, float]) -> tuple[float, Trial]:
        """The first trial that leaves `enough`, else the one that leaves least, and what it leaves."""
        best = (math.inf, Trial("", ""))
        for trial in trials(self.model, place, numbers):
            best = min(best, (self.left(trial, place), trial), key=lambda pair: pair[0])
            if best[0] <= enough:
                return best
        for scan in scans(self.model.spec, place):
            left, value = self.best(scan, place, error, enough)
            best = min(best, (left, scan.trial(value)), key=lambda pair: pair[0])
            if best[0] <= enough:
                return best
        return best

    def left(self, trial: Trial, place: Place) -> float:
        """The difference that is left; infinite where the model cannot be changed so."""
        self.done += 1
        if self.told is not None:
            self.told(self.done)
        trial = self.base.and_(trial)
        try:
            if trial.changes:
                return self.error(variant(self.model, change(self.model.spec, trial.changes), place), trial, place)
            if self.plain is None or self.plain[0] != place:
                self.plain = place, variant(self.model, self.model.spec, place)
            return self.error(self.plain[1], trial, place)
        except ValueError:
            return math.inf

    def error(self, other: LM, trial: Trial, place: Place) -> float:
        """What another model leaves, with the trial's weights for as long as it runs."""
        own = dict(self.model.named_parameters())
        try:
            for name, value in trial.weights.items():
                put(other, name, value)
            found = alone(other, self.step, self.reference).outputs.get(place.name)
        finally:
            for name in trial.weights:
                put(other, name, own[name].detach())
        return math.inf if found is None else relative(found, self.reference[place.wanted].flatten(0, -2))

    def best(self, scan: Scan, place: Place, error: float, enough: float) -> tuple[float, float]:
        """What the scan's best value leaves, and the value: a grid, and where it helps at all a golden-section search
        of the logarithm around its best point, until `enough`."""
        at = lambda x: (self.left(scan.trial(math.exp(x)), place), x)  # noqa: E731
        tried = [at(math.log(g)) for g in scan.grid]
        middle = tried.index(min(tried))
        low, high = tried[max(middle - 1, 0)][1], tried[min(middle + 1, len(tried) - 1)][1]
        if min(tried)[0] < HELPS * error:
            left, right = at(high - GOLDEN * (high - low)), at(low + GOLDEN * (high - low))
            for _ in range(ROUNDS):
                tried += [left, right]
                if min(left, right)[0] <= enough:
                    break
                if left[0] <= right[0]:
                    high, right = right[1], left
                    left = at(high - GOLDEN * (high - low))
                else:
                    low, left = left[1], right
                    right = at(low + GOLDEN * (high - low))
        least, x = min(tried)
        return least, math.exp(x)


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Values of a tree by dotted path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def fields_at(spec: ModelSpec, place: Place) -> list[tuple[str, Any]]:
    """The fields of the spec that shape a place: of its own part or block, and of the position schemes."""
    tree = dump(spec)
    if place.layer is None:
        return list(leaves(tree[place.name], place.name))
    name = spec.plan[spec.sources[place.layer]]
    return [*leaves(tree["blocks"][name], f"blocks.{name}"), *leaves(tree["positions"], "positions")]


def step_of(path: str, place: Place) -> str:
    """The step inside a place that a field acts on."""
    if place.layer is None:
        return {"head": "logits", "final_norm": "final"}.get(place.name, "in")
    if path.startswith("positions.") or ".qk_norm." in path:
        return "mixer.q"
    if ".scores." in path or ".sees." in path:
        return "mixer.scores"
    if ".router." in path:
        return "ffn.router.choice"
    return "norm" if ".norm." in path or ".pre." in path else "ffn" if path.endswith("act") else "out"


def trials(model: LM, place: Place, numbers: Mapping[str, float]) -> Iterator[Trial]:
    """Changes of the spec first, all alike fields of the place together before each alone; then of the weights."""
    fields = fields_at(model.spec, place)
    alike: dict[tuple[str, Any], list[str]] = {}
    for path, value in fields:
        if not isinstance(value, list | dict):
            alike.setdefault((path.rpartition(".")[2], value), []).append(path)
    for (leaf, value), paths in alike.items():
        for other in candidates(leaf, value, numbers):
            groups = [paths, *([p] for p in paths)] if len(paths) > 1 else [paths]
            for group in groups:
                names = " and ".join(group)
                cause = f"{names} is {shown(value)} here; {shown(other)} fits"
                yield Trial(step_of(group[0], place), cause, dict.fromkeys(group, other))
    if place.layer is not None:
        prefix = f"blocks.{model.spec.sources[place.layer]}."
        own = {name: p.detach() for name, p in model.named_parameters() if name.startswith(prefix)}
        yield from (Trial(*found) for found in rotary.changes(model.spec, own, numbers))
        yield from weight_trials(own, prefix)


def shown(value: Any) -> str:
    return "absent" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()


def candidates(leaf: str, value: Any, numbers: Mapping[str, float]) -> list[Any]:
    """Other values that a field of this name often has, first those that the configuration mentions."""

    def near(*words: str) -> list[float]:
        return [v for k, v in numbers.items() if any(word in k for word in words)]

    usual: dict[str, list[Any]] = {
        "eps": [*near("eps"), *EPS],
        "softcap": [None, *near("cap"), *CAPS],
        "window": [None, *(n for w in near("window", "local") for n in (int(w), int(w) + 1))],
        "factor": near("factor"),
        "original": near("original", "max_position"),
        "theta": [*near("theta", "freq", "base"), *THETAS],
        "scale": [
            *(w for v in near("scal", "multipl") if v > 0 for w in (v, 1 / v)),
            *(w for v in near("head_dim", "hidden_size", "_scalar") if v > 0 for w in (v**-0.5, v**0.5)),
            1.0,
        ],
        "act": list(get_args(Activation)),
        "weight": ["one", "plus_one"] if value in ("one", "plus_one") else [],
        "parallel": ["no", "own", "shared"],
        "kind": ["rmsnorm", "layernorm"] if value in ("rmsnorm", "layernorm") else [],
    }
    found = usual.get(leaf, [])
    if leaf == "window" and isinstance(value, int):
        found = [value + 1, value - 1, *found]
    if isinstance(value, bool):
        found = [not value]
    return [x for x in dict.fromkeys(found) if x != value and not (x == 0 and not isinstance(x, bool))]


def scans(spec: ModelSpec, place: Place) -> Iterator[Scan]:
    """Epsilons, all together and each alone, scales, caps and RoPE's factor, over many orders of magnitude."""
    fields = fields_at(spec, place)
    eps = {path: value for path, value in fields if path.endswith("eps") and value is not None}
    grid = tuple(10.0**e for e in range(-9, 1))
    if len(set(eps.values())) == 1 and len(eps) > 1:
        value = next(iter(eps.values()))
        yield Scan(step_of(next(iter(eps)), place), tuple(eps), f"{' and '.join(eps)} is {value:g} here", grid)
    for path, value in eps.items():
        yield Scan(step_of(path, place), (path,), f"{path} is {value:g} here", grid)
    for path, value in fields:
        if path.endswith(("scale", "softcap", "scaling.factor")):
            told = f"{path} is {shown(value)} here"
            yield Scan(step_of(path, place), (path,), told, tuple(2.0**e for e in range(-12, 13, 2)))


def weight_trials(own: Weights, prefix: str) -> Iterator[Trial]:
    """Square matrices transposed, matrices of one shape exchanged."""
    for name, w in own.items():
        if w.dim() >= 2 and w.shape[-1] == w.shape[-2]:
            yield Trial(inner(name, prefix), f"{name} is transposed", weights={name: w.mT.contiguous()})
    groups: dict[str, dict[str, Tensor]] = {}
    for name, w in own.items():
        owner, _, leaf = name.rpartition(".")
        groups.setdefault(owner if leaf in ("weight", "bias") else name, {})[leaf] = w
    for (a, first), (b, second) in combinations(groups.items(), 2):
        shapes = [[(leaf in ("weight", "bias") and leaf, w.shape) for leaf, w in g.items()] for g in (first, second)]
        matrix = any(w.dim() > 1 for w in first.values())
        if matrix and shapes[0] == shapes[1] and a.rpartition(".")[0] == b.rpartition(".")[0]:
            other = {f"{a}.{leaf}" if a.rpartition(".")[2] != leaf else a: w for leaf, w in zip(first, second.values())}
            other |= {
                f"{b}.{leaf}" if b.rpartition(".")[2] != leaf else b: w for leaf, w in zip(second, first.values())
            }
            yield Trial(inner(a, prefix), f"{a} and {b} are exchanged", weights=other)


def inner(name: str, prefix: str) -> str:
    """`blocks.1.mixer.q.weight` -> `mixer.q`."""
    return name.removeprefix(prefix).removesuffix(".weight").removesuffix(".bias")

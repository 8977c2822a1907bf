"""From a study's Results to one configuration: what the evidence supports, and which ties are broken by cost.

Reads only Results. A choice is supported when its arm is better than the base arm, or when every other arm is worse.
Among arms that are not distinguishable from the best, the cheapest is taken: fewest state bytes, then parameters, then
changes. That is a decision, not a finding, and its reason says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from assay.spec.result import Result
from assay.study.evidence import SIZES, Evidence, lower_is_better
from assay.study.judge import Court, verdicts
from assay.study.statistics import Comparison, Metric, compare

COSTS = ("state_bytes_per_token", "params_total")
WORDS: Mapping[str, str] = {"state_bytes_per_token": "state bytes a token", "params_total": "parameters"}
COST_STEP = 0.02
"""Of the base arm's: how closely arms are matched."""
MAX_COMBINATIONS = 10_000
Sizes = Callable[[dict[str, Any]], Mapping[str, float]]
TABLE = (
    *("loss_nats", "bits_per_byte", "in_context_nats", "params_total", "params_active", "state_bytes_per_token"),
    *("train_tok_s", "mfu", "extrapolation.loss_nats", "extrapolation.last_nats"),
    *("passkey.accuracy", "latency.ttft_s", "latency.prefill_s", "latency.decode_tok_s", "latency.itl_ms_p50"),
    "memory.state_bytes_measured",
)
UNITS: Mapping[str, str] = {
    "_nats": "nats",
    "_per_byte": "bits/byte",
    "_bytes": "bytes",
    "tok_s": "tokens/s",
    "_ms_p50": "ms",
    "_s": "s",
}


@dataclass(frozen=True)
class Choice:
    """What one stage contributes."""

    study: str
    arm: str
    reason: str
    supported: bool
    changes: dict[str, Any]


@dataclass(frozen=True)
class Synthesis:
    constraints: dict[str, float]
    choices: tuple[Choice, ...]
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Decided:
    """A stage's court, arms and numbers, read back from its Results."""

    study: str
    court: Court
    changes: Mapping[str, dict[str, Any]]
    evidence: Evidence
    found: Mapping[str, Comparison]

    def costs(self, arm: str) -> tuple[float, ...]:
        """What ties are broken by, in steps: sizes that differ by less were meant to be equal and only rounded."""
        sizes = (self._size(name, arm) / self._size(name, self.court.base_arm) for name in COSTS)
        return (*(math.inf if math.isnan(size) else round(size / COST_STEP) for size in sizes), len(self.changes[arm]))

    def _size(self, name: str, arm: str) -> float:
        known = self.evidence.mean(name, arm)
        return math.nan if known is None or known <= 0 else known

    def value(self, arm: str) -> float:
        """Mean of the metric, as something to be made small."""
        mean = self.evidence.mean(self.court.metric.name, arm)
        value = math.inf if mean is None or math.isnan(mean) else mean
        return value if self.court.metric.lower_is_better or value == math.inf else -value


def court_of(study: Result) -> Court:
    """What a stage was judged by, from its `study` line."""
    values: dict[str, Any] = study.values
    name = str(values["metric"])
    metric = Metric(
        name, bool(values.get("lower_is_better", lower_is_better(name))), float(values.get("interest", 0.0))
    )
    return Court(values["base_arm"], tuple(a["name"] for a in values["arms"]), metric, float(values.get("alpha", 0.05)))


def synthesise(
    results: Sequence[Result],
    constraints: Mapping[str, float],
    sizes: Sizes | None = None,
) -> Synthesis:
    """Choose an arm from every stage that has a `study` line, so that the constraints hold.

    `sizes(changes)` counts the merged configuration by a trial's names (state_bytes_per_token, params_total), and
    raises ValueError where it cannot be built; constraints that it does not count are checked arm by arm, each in its
    own stage. Raises ValueError where nothing fits.
    """
    counts = sizes({}) if sizes else {}
    own = {name: most for name, most in constraints.items() if name not in counts}
    # A line without arms is the frame of a study of studies.
    decided = [_decided(results, r) for r in results if r.kind == "study" and r.values.get("arms")]
    if not decided:
        raise ValueError("there are no stages to choose from")
    ranked = [_buildable(_ranked(stage, own), sizes) for stage in decided]
    orders = itertools.product(*(range(len(choices)) for choices in ranked))
    for order in sorted(itertools.islice(orders, MAX_COMBINATIONS), key=sum):
        choices, changes = _merged([options[i] for options, i in zip(ranked, order)])
        counted = _counted(changes, sizes)
        if counted is not None and all(counted[name] <= most for name, most in constraints.items() if name in counted):
            return Synthesis(dict(constraints), choices, changes)
    said = ", ".join(f"{name} <= {most:g}" for name, most in constraints.items())
    raise ValueError(f"no combination of the stages' arms has {said}" if said else "no combination can be built")


def _counted(changes: dict[str, Any], sizes: Sizes | None) -> Mapping[str, float] | None:
    """None for what cannot be built: two stages' changes may exclude each other."""
    try:
        return sizes(changes) if sizes else {}
    except ValueError:
        return None


def _buildable(options: Sequence[Choice], sizes: Sizes | None) -> list[Choice]:
    """Without the arms whose changes the synthesis's base model does not take; what is left says which and why."""
    lost = {}
    for choice in options if sizes else ():
        try:
            sizes(choice.changes)  # type: ignore[misc]
        except ValueError as error:
            lost[choice.arm] = str(error)
    said = "".join(f" {arm} cannot be built here: {why}." for arm, why in lost.items())
    kept = [choice for choice in options if choice.arm not in lost]
    if not kept:
        raise ValueError(f"no arm of {options[0].study} can be taken:{said}")
    return [replace(choice, reason=choice.reason + said) for choice in kept]


def _decided(results: Iterable[Result], study: Result) -> _Decided:
    court, evidence = court_of(study), Evidence(results, study.study)
    arms: Any = study.values["arms"]
    changes = {a["name"]: dict(a.get("changes") or {}) for a in arms}
    return _Decided(study.study, court, changes, evidence, verdicts(evidence, court))


def _ranked(stage: _Decided, constraints: Mapping[str, float]) -> list[Choice]:
    """A stage's arms from the one to take to the last resort, with reasons. Untested arms are not taken."""
    base = stage.court.base_arm
    allowed = [arm for arm in stage.court.arms if not _exceeds(stage, arm, constraints)]
    beyond = [arm for arm in stage.court.arms if arm not in allowed]
    tested = [a for a in allowed if a == base or (a in stage.found and stage.found[a].verdict != "not tested")]
    if not tested:
        said = ", ".join(f"{name} <= {most:g}" for name, most in constraints.items())
        raise ValueError(f"synthesis: no tested arm of {stage.study} has {said}")
    best = min(tested, key=stage.value)
    metric = stage.court.metric
    samples = {arm: stage.evidence.samples(metric.name, arm) for arm in tested}
    against = compare(samples[best], {a: s for a, s in samples.items() if a != best}, metric, stage.court.alpha)
    held_back = {a for a in tested if base in tested and a != base and stage.found[a].verdict == "worse"}
    ties = [a for a in tested if a not in held_back and (a == best or against[a].verdict != "worse")]
    ties.sort(key=stage.costs)
    rest = sorted((a for a in tested if a not in ties), key=stage.value)
    return [_choice(stage, arm, (ties, rest), beyond) for arm in (*ties, *rest)]


def _exceeds(stage: _Decided, arm: str, constraints: Mapping[str, float]) -> bool:
    means = {name: stage.evidence.mean(name, arm) for name in constraints}
    return any(mean is not None and mean > constraints[name] for name, mean in means.items())


def _choice(stage: _Decided, arm: str, ranks: tuple[list[str], list[str]], beyond: Sequence[str]) -> Choice:
    ties, rest = ranks
    base, metric = stage.court.base_arm, stage.court.metric.name
    others = [a for a in ties if a != arm]
    found = stage.found.get(arm)
    parts = []
    if found is not None and found.verdict in ("better", "worse"):
        parts.append(f"{arm} is {found.verdict} than {base} in {metric}{_numbers(found)}")
    elif arm == base:
        worse = [a for a, c in stage.found.items() if c.verdict == "worse" and a not in beyond]
        parts.append(f"{base} is the base arm" + (f", and {_list(worse)} worse" if worse else ""))
    if arm in ties and others:
        parts.append(f"not distinguishable from {_list(others, '')} in {metric}; {_why_cheaper(stage, arm, others)}")
    elif arm not in ties:
        parts.append("taken because the constraints leave nothing better")
    if beyond:
        parts.append(f"{_list(beyond)} beyond the constraints")
    better = found is not None and found.verdict == "better"
    supported = arm in ties and (better or (not others and bool(rest)))
    return Choice(stage.study, arm, "; ".join(parts) + ".", supported, dict(stage.changes[arm]))


def _why_cheaper(stage: _Decided, arm: str, others: Sequence[str]) -> str:
    for name, mine, theirs in zip(COSTS, stage.costs(arm), zip(*(stage.costs(a) for a in others))):
        if mine < min(theirs):
            own, other = stage.evidence.mean(name, arm), min(stage.evidence.mean(name, a) or math.inf for a in others)
            return f"a tie, broken by fewer {WORDS[name]} ({own:.6g} against {other:.6g})"
    return "a tie, broken by cost, then by fewer changes"


def _numbers(found: Comparison) -> str:
    if found.delta is None or found.low is None or found.high is None:
        return f" ({found.note})" if found.note else ""
    return f" by {abs(found.delta):.4g} ({found.low:+.4g} to {found.high:+.4g})"


def _list(names: Sequence[str], verb: str = "are") -> str:
    said = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{said} {'is' if len(names) == 1 else verb}" if verb else said


def _merged(options: Sequence[Choice]) -> tuple[tuple[Choice, ...], dict[str, Any]]:
    """All changes together. Where two stages set one path, the supported one wins, else the earlier one."""
    changes: dict[str, Any] = {}
    owner: dict[str, str] = {}
    out = {}
    for choice in sorted(options, key=lambda c: not c.supported):
        lost = {p: owner[p] for p, v in choice.changes.items() if p in changes and changes[p] != v}
        for path, value in choice.changes.items():
            if path not in changes:
                changes[path], owner[path] = value, choice.study
        said = "".join(f" {path} is left to {study}." for path, study in lost.items())
        out[choice.study] = Choice(choice.study, choice.arm, choice.reason + said, choice.supported, choice.changes)
    # What holds others goes first: a whole block set after a field in it would undo the field.
    ordered = sorted(changes, key=lambda path: path.count("."))
    return tuple(out[choice.study] for choice in options), {path: changes[path] for path in ordered}


def comparison_table(evidence: Evidence, court: Court, chosen: str) -> list[dict[str, Any]]:
    """The chosen configuration against the baseline on every metric there is; rows are not corrected for each other."""
    out = []
    for name in TABLE:
        samples = [evidence.samples(name, arm) for arm in (court.base_arm, chosen)]
        means = [evidence.mean(name, arm) for arm in (court.base_arm, chosen)]
        if means[0] is None or means[1] is None:
            continue
        metric = court.metric if name == court.metric.name else Metric(name, lower_is_better(name))
        found = compare(samples[0], {chosen: samples[1]}, metric, court.alpha)[chosen]
        row: dict[str, Any] = {"delta": found.delta, "low": found.low, "high": found.high, "verdict": found.verdict}
        if name.startswith(SIZES):
            row = _exact(means[1] - means[0])
        unit = next((unit for ending, unit in UNITS.items() if name.endswith(ending)), "")
        out.append({"metric": name, "unit": unit, "baseline": means[0], "chosen": means[1], **row})
    return out


def _exact(delta: float) -> dict[str, Any]:
    """A size is known, not sampled: smaller is better, and equal is equal."""
    verdict = "better" if delta < 0 else "worse" if delta > 0 else "not distinguishable"
    return {"delta": delta, "low": delta, "high": delta, "verdict": verdict}

"""The headline in words: what was compared, what was decided, how the literature's claims fared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from assay.report.collect import Stage
from assay.report.tables import claim_rows, synthesis, titles_of
from assay.report.words import between, interval, join, plural, seconds, unit
from assay.spec.result import OUTCOMES, VERDICTS

_LEADS = {
    "better": "than {base}: ",
    "worse": "than {base}: ",
    "not distinguishable": "from {base}: ",
    "not tested": "",
}


def headline(stages: Sequence[Stage]) -> list[str]:
    """Sentences for the top of the page."""
    trials = {(t.study, t.arm, t.seed): t for s in stages for a in s.arms for t in a.trials}
    seconds_spent = sum(v for s in stages for a in s.arms for v in _own_times(s, a))
    arms = sum(1 for s in stages for a in s.arms if not a.is_base)
    lines = []
    if arms:
        spent = f", {seconds(seconds_spent)} of training in all" if seconds_spent else ""
        where = f" in {plural(len(stages), 'stage')}" if len(stages) > 1 else ""
        against = "its baseline" if arms == 1 else "their baselines" if len(stages) > 1 else "the baseline"
        lines.append(f"{plural(arms, 'arm')}{where}, compared with {against} over {plural(len(trials), 'run')}{spent}.")
    verdicts = Counter(word for stage in stages for word in decided(stage).values())
    if verdicts:
        lines.append(f"Of the {plural(arms, 'arm')}, {_tally(verdicts, VERDICTS)}.")
    claims = claim_counts(stages)
    if sum(claims.values()):
        outcomes = _tally(claims, OUTCOMES)
        lines.append(f"Of {plural(sum(claims.values()), 'claim')} written down before the runs, {outcomes}.")
    titles = titles_of(stages)
    return lines + [line for stage in stages if (line := _chosen(stage, titles))]


def _own_times(stage: Stage, arm: Any) -> list[float]:
    return [
        float(t.values["train_s"]) for t in arm.trials if t.study == stage.name and _is_time(t.values.get("train_s"))
    ]


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value


def _tally(counts: Counter[str], order: tuple[str, ...]) -> str:
    return join([f"{counts[word]} {_is(word, counts[word])}{word}" for word in order if counts[word]])


def _is(word: str, n: int) -> str:
    be = "is" if n == 1 else "are"
    was = "was" if n == 1 else "were"
    return f"{was} " if word in ("confirmed", "contradicted", "not tested") else f"{be} "


def decided(stage: Stage) -> dict[str, str]:
    """Arm -> the word of its verdict on the stage's own metric."""
    arms = [arm for arm in stage.arms if not arm.is_base]
    found = {arm.name: stage.verdict(arm.name, stage.metric) for arm in arms}
    return {name: str(v.values.get("verdict")) if v else "not tested" for name, v in found.items()}


def claim_counts(stages: Sequence[Stage]) -> Counter[str]:
    return Counter(row["outcome"] for stage in stages for row in claim_rows(stage))


def decision(stage: Stage) -> list[dict[str, Any]]:
    """What a stage decided: for each verdict, a lead ('than NoPE: ') and its arms with their differences."""
    words = decided(stage)
    base = stage.base.title if stage.base else "the baseline"
    groups = []
    for word in VERDICTS:
        arms = [(a.title, _difference(stage, a.name)) for a in stage.arms if words.get(a.name) == word]
        if arms:
            lead = _LEADS[word].format(base=base)
            groups.append({"verdict": word, "lead": lead, "arms": arms, "between": between(a for a, _ in arms)})
    return groups


def _difference(stage: Stage, arm: str) -> str:
    verdict = stage.verdict(arm, stage.metric)
    if verdict is None or verdict.values.get("delta") is None:
        return ""
    shown, _ = interval(verdict.values["delta"], verdict.values.get("low"), verdict.values.get("high"))
    return f"{shown} {unit(stage.metric)}".strip()


def _chosen(stage: Stage, titles: Mapping[tuple[str, str], str]) -> str:
    found = synthesis(stage, titles)
    if found is None or not found["choices"]:
        return ""
    sure = [c["arm"] for c in found["choices"] if c["supported"]]
    ties = [c["arm"] for c in found["choices"] if not c["supported"]]
    parts = [f"{join(sure)} on evidence"] if sure else []
    parts += [f"{join(ties)} as {'a tie' if len(ties) == 1 else 'ties'} broken by cost"] if ties else []
    line = f"The synthesis takes {' and '.join(parts)}"
    words = [row for row in found["table"] if row["verdict"] in VERDICTS[:3]]
    if words:
        first = words[0]
        than = "from" if first["verdict"] == "not distinguishable" else "than"
        reach = (
            f" by {first['delta'].lstrip('+−')} {first['unit']}" if first["verdict"] != "not distinguishable" else ""
        )
        line += f"; in {first['metric']} it is {first['verdict']} {than} the baseline{reach}"
    return line + "." + _price(words)


def _price(words: Sequence[Mapping[str, Any]]) -> str:
    """What the choice lost by, which a better loss must not hide."""
    lost = [
        f"{row['metric']} ({row['chosen']} against {row['baseline']})" for row in words[1:] if row["verdict"] == "worse"
    ]
    return f" It is worse in {join(lost)}." if lost else ""

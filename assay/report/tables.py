"""Rows for the page's tables: plain text in, plain text out; the templates escape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from assay.report.collect import Arm, Stage
from assay.report.words import DASH, interval, number, plural, shown, significant, title_of, unit
from assay.spec.result import Result

COSTS = {
    "params_total": "parameters",
    "params_active": "active",
    "params_embedding": "embedding",
    "state_bytes_per_token": "state/token",
    "train_flops": "training FLOPs",
    "tokens": "tokens",
    "train_s": "training time",
    "train_tok_s": "training speed",
    "mfu": "MFU",
    "peak_memory_bytes": "peak memory",
    "bits_per_byte": "bits/byte",
    "in_context_nats": "in-context gain",
}
KNOWN_MEASURES = (
    "extrapolation passkey latency memory kernels attention lens steps_to_loss wavelengths".split()  # noqa: SIM905
)
MOST_ROWS = 200


def change_lines(changes: Mapping[str, Any]) -> list[str]:
    """{'model.x': 2} -> ['model.x = 2']"""
    return [f"{path} = {plain(value)}" for path, value in changes.items()]


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def verdict_tables(stage: Stage) -> list[dict[str, Any]]:
    """One table a metric: the base arm, then every arm; one without a verdict is 'not tested'."""
    if not stage.arms:
        return []
    return [
        {
            "metric": title_of(metric),
            "unit": unit(metric),
            "rows": [_verdict_row(stage, arm, metric) for arm in stage.arms],
        }
        for metric in stage.metrics
    ]


def _verdict_row(stage: Stage, arm: Arm, metric: str) -> dict[str, Any]:
    verdict = stage.verdict(arm.name, metric)
    values = verdict.values if verdict else {}
    delta, reach = interval(values.get("delta"), values.get("low"), values.get("high"))
    diverged = sum(1 for t in arm.trials if t.values.get("diverged"))
    return {
        "arm": arm.title,
        "note": f"{diverged} of {plural(len(arm.trials), 'seed')} diverged" if diverged else "",
        "mean": significant(arm.mean(metric)),
        "seeds": str(values.get("seeds", len(arm.values(metric)) or DASH))
        if not arm.is_base
        else _count(stage, arm, metric),
        "delta": delta if verdict else DASH,
        "interval": reach,
        "p": _p(values.get("p_holm", values.get("p"))),
        "noise": "±" + significant(values["noise"], 2) if number(values.get("noise")) is not None else DASH,
        "verdict": "baseline" if arm.is_base else str(values.get("verdict", "not tested")),
    }


def _count(stage: Stage, arm: Arm, metric: str) -> str:
    said = next((v.values.get("base_seeds") for v in stage.verdicts if v.values.get("metric") == metric), None)
    return str(said or len(arm.values(metric)) or DASH)


def _p(value: Any) -> str:
    p = number(value)
    return DASH if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def cost_table(stage: Stage) -> dict[str, Any] | None:
    """What each arm costs, from its runs; columns that nobody has are left out."""
    arms = [arm for arm in stage.arms if arm.trials]
    keys = [key for key in COSTS if any(arm.mean(key) is not None for arm in arms)]
    if not keys:
        return None
    rows = [[arm.title, *(shown(key, arm.mean(key)) for key in keys)] for arm in arms]
    return {"head": ["arm", *(COSTS[key] for key in keys)], "rows": rows}


def other_tables(stage: Stage) -> list[dict[str, Any]]:
    """Measurements that this report has no plot for are shown as they are."""
    tables = []
    for what in dict.fromkeys(w for arm in stage.arms for w in arm.rows if w not in KNOWN_MEASURES):
        rows = [(arm.title, row) for arm in stage.arms for row in arm.rows.get(what, ())]
        keys = list(dict.fromkeys(key for _, row in rows for key in row))
        body = [[title, *(shown(key, row.get(key)) for key in keys)] for title, row in rows[:MOST_ROWS]]
        more = f"{len(rows) - MOST_ROWS} more rows are in results.jsonl" if len(rows) > MOST_ROWS else ""
        tables.append({"title": title_of(what), "head": ["arm", *map(title_of, keys)], "rows": body, "more": more})
    return tables


def claim_rows(stage: Stage) -> list[dict[str, str]]:
    keys = ("id", "text", "source", "test", "outcome", "evidence")
    rows = [{key: _text(claim.values.get(key)) for key in keys} for claim in stage.claims]
    known = {row["id"] for row in rows}
    declared = [c for c in stage.info.get("claims") or [] if isinstance(c, dict) and _text(c.get("id")) not in known]
    return rows + [{**{key: _text(c.get(key)) for key in keys}, "outcome": "not tested"} for c in declared]


def _text(value: Any) -> str:
    return "" if value is None else plain(value)


def failures(stage: Stage) -> list[dict[str, str]]:
    titles = {arm.name: arm.title for arm in stage.arms}
    return [_failure(f, titles.get(str(f.arm), str(f.arm))) for f in stage.of("failure")]


def _failure(failure: Result, title: str) -> dict[str, str]:
    values = failure.values
    return {
        "arm": title,
        "seed": DASH if failure.seed is None else str(failure.seed),
        "metric": title_of(str(values.get("metric", ""))),
        "score": shown(str(values.get("metric", "")), values.get("score")),
        **{key: _text(values.get(key)) for key in ("prompt", "text", "why")},
    }


def synthesis(stage: Stage, titles: Mapping[tuple[str, str], str]) -> dict[str, Any] | None:
    """What was chosen and why; `titles` names the arms of all stages, by (stage, arm)."""
    found = stage.of("synthesis")
    if not found:
        return None
    values = found[-1].values
    return {
        "constraints": [(title_of(k), shown(k, v)) for k, v in _items(values.get("constraints"))],
        "choices": [_choice(c, titles) for c in values.get("choices") or [] if isinstance(c, dict)],  # type: ignore[union-attr]
        "table": [_comparison(row) for row in values.get("table") or [] if isinstance(row, dict)],  # type: ignore[union-attr]
        "spec": _text(values.get("spec")),
        "checkpoint": _text(values.get("checkpoint")),
    }


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _choice(choice: Mapping[str, Any], titles: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    study, arm = _text(choice.get("study")), _text(choice.get("arm"))
    named = {"study": titles.get((study, ""), study), "arm": titles.get((study, arm), arm)}
    return {**named, "reason": _text(choice.get("reason")), "supported": bool(choice.get("supported"))}


def _comparison(row: Mapping[str, Any]) -> dict[str, Any]:
    metric = _text(row.get("metric"))
    delta, reach = interval(row.get("delta"), row.get("low"), row.get("high"))
    if number(row.get("low")) is None and number(row.get("delta")) is not None:
        change = float(row["delta"])
        delta = ("+" if change > 0 else "") + shown(metric, change) if change else "0"
    return {
        "metric": title_of(metric),
        "unit": unit(metric) or _text(row.get("unit")),
        "says_unit": not unit(metric) and bool(row.get("unit")),
        "baseline": shown(metric, row.get("baseline")),
        "chosen": shown(metric, row.get("chosen")),
        "delta": delta,
        "interval": reach,
        "verdict": _text(row.get("verdict")) or "not tested",
    }


def titles_of(stages: Sequence[Stage]) -> dict[tuple[str, str], str]:
    """(stage, arm) -> the arm's title, and (stage, '') -> the stage's."""
    names = {(s.name, a.name): a.title for s in stages for a in s.arms}
    return {**names, **{(s.name, ""): s.title for s in stages}}


def environments(results: Sequence[Result]) -> list[list[tuple[str, str]]]:
    """Every distinct machine and version that the results name."""
    found = [list(r.values.items()) + _envelope(r) for r in results if r.kind == "environment"]
    if not found:
        found = [_envelope(r) for r in results[-1:]]
    tables = [[(title_of(k), shown(k, v) if k != "threads" else str(v)) for k, v in items] for items in found]
    return [table for place, table in enumerate(tables) if table not in tables[:place]]


def _envelope(result: Result) -> list[tuple[str, Any]]:
    pairs = [("assay", result.version or None), ("commit", result.commit), ("device", result.device)]
    return [(k, v) for k, v in [*pairs, ("threads", result.threads)] if v is not None]

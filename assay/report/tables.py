"""Rows for the page's tables: plain text in, plain text out; the templates escape."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from assay.report.collect import Arm, Row, Stage
from assay.report.words import (
    DASH,
    DURING,
    MINUS,
    PLACES,
    TO,
    interval,
    join,
    kind,
    number,
    plural,
    shown,
    significant,
    title_of,
    unit,
)
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
PLOTTED = {
    "extrapolation": "ratio",
    "recovery": "ratio",
    "passkey": "length",
    "latency": "context",
    "memory": "context",
    "growth": "context",
    "kernels": "length",
    "attention": "layer",
    "lens": "layer",
    "steps_to_loss": "loss_nats",
    "wavelengths": "dim",
}
"""What has a plot, with the column it is drawn against: rows without it (a fit, a slope) stand in a table."""
TITLES = {
    "decode_fit": "Time of a decode step, measured and fitted",
    "norms": "Time of the norms",
    "growth": "How time, memory and FLOPs grow with the context",
    "kernels": "Kernels, summed up",
    "sparsity": "What a few keys hold, and what is lost without the others",
}
NOTES = {
    "decode_fit": "The fit: a fixed time, a time for each sequence, and a time for each byte of state that is read.",
    "growth": "A slope is p where a column is about c times context^p over the upper half of the contexts; that of the "
    "mixers' FLOPs is what theory says.",
}
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
    """What each arm costs, from its runs; what is the same for all is said once, what nobody has is left out."""
    arms = [arm for arm in stage.arms if arm.trials]
    keys = [key for key in COSTS if any(arm.mean(key) is not None for arm in arms)]
    if not keys:
        return None
    cells = {key: [shown(key, arm.mean(key)) for arm in arms] for key in keys}
    if cells.get("params_active") == cells.get("params_total"):
        keys = [key for key in keys if key != "params_active"]  # they differ where experts do
    alike = [key for key in keys if len(arms) > 1 and len(set(cells[key])) == 1]
    keys = [key for key in keys if key not in alike]
    rows = [[arm.title, *(cells[key][place] for key in keys)] for place, arm in enumerate(arms)]
    same = join([f"{title_of(key) if key.startswith('params') else COSTS[key]} {cells[key][0]}" for key in alike])
    return {"head": ["arm", *(COSTS[key] for key in keys)], "rows": rows if keys else [], "same": same}


def other_tables(stage: Stage) -> list[dict[str, Any]]:
    """Measurements without a plot, means over seeds: a table for each kind of row that they have."""
    tables = []
    for what in dict.fromkeys(w for arm in stage.arms for w in arm.rows if not w.startswith(DURING)):
        kinds: dict[tuple[str, ...], list[tuple[str, Row]]] = {}
        for arm in stage.arms:
            for row in over_runs(row for row in arm.rows.get(what, ()) if _is_untold(what, row)):
                kinds.setdefault(tuple(row), []).append((arm.title, row))
        for place, (keys, rows) in enumerate(kinds.items()):
            keys = tuple(key for key in keys if any(row[key] is not None for _, row in rows))
            body = [[title, *(_cell(key, row[key]) for key in keys)] for title, row in rows[:MOST_ROWS]]
            more = [NOTES.get(what, "")] if place == 0 else []
            more += [f"{len(rows) - MOST_ROWS} more rows are in results.jsonl"] if len(rows) > MOST_ROWS else []
            heading = TITLES.get(what, title_of(what)[:1].upper() + title_of(what)[1:])
            told = {"title": heading if place == 0 else "", "more": " ".join(filter(None, more))}
            tables.append({**told, "name": heading, "head": ["arm", *map(title_of, keys)], "rows": body})
    return tables


def _cell(key: str, value: Any) -> str:
    """A place is written out, what was found there as its metric reads."""
    return significant(value) if key in PLACES else shown(key, value)


def _is_untold(what: str, row: Row) -> bool:
    """Whether no plot shows this row, though it holds a number."""
    x = PLOTTED.get(what)
    if x is None:
        return True
    return number(row.get(x)) is None and any(
        number(v) is not None for k, v in row.items() if k not in (*PLACES, "seed")
    )


def over_runs(rows: Iterable[Row]) -> list[Row]:
    """One row for those of all seeds that say the same but for their measured numbers, of which it has the means."""
    found: dict[Any, list[Row]] = {}
    times: Counter[Any] = Counter()
    for row in rows:
        said = {k: v for k, v in row.items() if k != "seed" and (k in PLACES or not isinstance(v, float))}
        place = (plain(said), tuple(row))
        times[place, row["seed"]] += 1
        found.setdefault((place, times[place, row["seed"]]), []).append(row)
    return [{k: _mean([r[k] for r in same]) for k in same[0] if k != "seed"} for same in found.values()]


def _mean(values: Sequence[Any]) -> Any:
    """Of measured numbers; anything else is alike in all rows."""
    finite = [v for v in values if isinstance(v, float) and number(v) is not None]
    return sum(finite) / len(finite) if len(finite) == len(values) else values[0]


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
        "generated": _visible(_text(values.get("text"))),
        **{key: _text(values.get(key)) for key in ("prompt", "why")},
    }


def _visible(text: str) -> str:
    """The text, or in words what cannot be seen."""
    return (
        text
        if text.strip()
        else f"({plural(len(text), 'character')}, all of them white space)"
        if text
        else "(nothing)"
    )


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
    if kind(metric) or metric.startswith("params") or number(row.get("low")) is None:
        delta, *ends = (_signed(metric, row.get(key)) for key in ("delta", "low", "high"))
        reach = f"{ends[0]}{TO}{ends[1]}" if row.get("low") != row.get("high") else DASH
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


def _signed(metric: str, value: Any) -> str:
    """A difference in the unit that its metric is shown in: '+1.80 ms', '0'."""
    change = number(value)
    return "0" if change == 0 else ("+" if change and change > 0 else "") + shown(metric, value).replace("-", MINUS)


def titles_of(stages: Sequence[Stage]) -> dict[tuple[str, str], str]:
    """(stage, arm) -> the arm's title, and (stage, '') -> the stage's."""
    names = {(s.name, a.name): a.title for s in stages for a in s.arms}
    return {**names, **{(s.name, ""): s.title for s in stages}}


def environments(results: Sequence[Result]) -> list[list[tuple[str, str]]]:
    """Every distinct machine and version that the results name."""
    found = [list(r.values.items()) + _envelope(r) for r in results if r.kind == "environment"]
    if not found:
        found = [_envelope(r) for r in results[-1:]]
    tables = [
        [(title_of(k), shown(k, v) if not k.startswith("threads") else str(v)) for k, v in items] for items in found
    ]
    return [table for place, table in enumerate(tables) if table not in tables[:place]]


def _envelope(result: Result) -> list[tuple[str, Any]]:
    pairs = [("assay", result.version or None), ("commit", result.commit), ("device", result.device)]
    threads = "threads of a run" if "threads" in result.values else "threads"
    return [(k, v) for k, v in [*pairs, (threads, result.threads)] if v is not None]

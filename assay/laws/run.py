"""A ladder from request to findings: sweep, climb, predict the top rung, run it, and say how far off it was."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assay import __version__
from assay.laws.fits import Options, analyse, fitted, predict
from assay.laws.isoflop import parabola, power, rung_bests
from assay.laws.ladder import Ladder, judged
from assay.laws.plan import per_token, rate_law
from assay.laws.points import from_rows, of_results
from assay.spec.load import to_yaml
from assay.spec.result import Result, read_results
from assay.study.run import Session, commit
from assay.study.runners.folder import Folder
from assay.study.runners.local import Failed, run_trials
from assay.study.sweep import Curve
from assay.study.trials import Trial

RUN_TRIAL = "assay.laws.branched:run_trial"
PREDICTION, FINDINGS = "prediction", "laws"
Plain = dict[str, Any]


@dataclass(frozen=True)
class Climbed:
    """findings: see `concluded`. failed: runs that gave no Result."""

    findings: Plain
    failed: tuple[Failed, ...]


def climb(ladder: Ladder, out: str | Path, session: Session, options: Options) -> Climbed:
    """Run a ladder into the folder `out`, or go on with it there. The prediction of the top rung is on disk before the
    first of its runs. Ctrl-C stops it; what is there stays. options.count: the ladder's."""
    session = replace(session, pool=replace(session.pool, function=RUN_TRIAL))
    with Folder(out) as folder:
        folder.bind(digest(ladder), {"study": ladder.name, "budget": "ladder"})
        failed = _run(ladder.sweep(), folder, session)
        rates = best_rates(ladder, folder.read())
        for rung in range(ladder.top):
            failed += _run(ladder.runs(rung, rates), folder, session)
        if (told := said(folder.read(), PREDICTION)) is None:
            told = prediction(ladder, folder.read(), options)
            folder.append([_line(session, ladder, PREDICTION, told)])
        failed += _run(ladder.runs(ladder.top, rates), folder, session)
        findings = concluded(ladder, folder.read(), told, options)
        _conclude(ladder, folder, session, told, findings)
        return Climbed(findings, tuple(failed))


def foreseen(ladder: Ladder, out: str | Path) -> list[tuple[Trial, bool]]:
    """Every run, and whether the folder has its Result. The rates of a sweep that is not done are the recipe's."""
    folder = Folder(out)
    rates = best_rates(ladder, folder.read())
    trials = ladder.sweep() + [t for rung in range(ladder.top + 1) for t in ladder.runs(rung, rates)]
    left = {id(trial) for trial in folder.left(trials)}
    return [(trial, id(trial) not in left) for trial in trials]


def digest(ladder: Ladder) -> str:
    """16 hex digits over the sizes, the rungs, the recipe and the sweep."""
    parts = [
        [s.digest for s in ladder.sizes],
        ladder.rungs.model_dump(),
        ladder.recipe.digest,
        [ladder.spec.warmup, ladder.spec.decay],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _run(trials: Sequence[Trial], folder: Folder, session: Session) -> list[Failed]:
    left = folder.adopt(trials)
    with session.watch(left) if session.watch else nullcontext(None) as watcher:
        return run_trials(left, folder, session.pool, watcher)


def sweep_curves(ladder: Ladder, results: Iterable[Result]) -> dict[str, Curve]:
    """size -> loss by learning rate, from the sweep's lines."""
    points: dict[str, dict[float, float | None]] = {size.name: {} for size in ladder.sizes}
    for r in results:
        if r.kind == "sweep" and r.arm in points and r.seed is not None:
            loss = r.values["loss_nats"]
            points[r.arm][float(r.values["learning_rate"])] = float(loss) if isinstance(loss, int | float) else None  # type: ignore[arg-type]
    return {
        name: Curve(tuple(sorted(found)), tuple(found[r] for r in sorted(found)))
        for name, found in points.items()
        if found
    }


def best_rates(ladder: Ladder, results: Iterable[Result]) -> dict[str, float]:
    """size -> recipe.optimizer.lr, to three digits: the lowest point of its sweep's parabola; what a power law of the
    other sizes says for one without a sweep. Nothing where fewer than two sizes have one."""
    curves = sweep_curves(ladder, results)
    found = {name: best for name, curve in curves.items() if (best := curve.optimum) is not None}
    swept = [{"params": s.params, "lr": found[s.name]} for s in ladder.sizes if s.name in found]
    law = power_or_none(swept, "params", "lr")
    rates = {s.name: law["scale"] * s.params ** law["exponent"] for s in ladder.sizes} if law else {}
    return {name: float(f"{rate:.3g}") for name, rate in (rates | found).items()}


def rung_points(ladder: Ladder, results: Iterable[Result], rung: int | None = None) -> list[Plain]:
    """Rows of the runs of a rung, or of all below the top."""
    names = {ladder.study(r) for r in (range(ladder.top) if rung is None else [rung])}
    return of_results(r for r in results if r.study in names)


def prediction(ladder: Ladder, results: Sequence[Result], options: Options) -> Plain:
    """Of the top rung from all below it: the loss of every size, the best size by the law and by the parabolas."""
    points = from_rows(rung_points(ladder, results), options.count, ladder.name)
    law = fitted(points, options)
    flops, top = ladder.rungs.flops[ladder.top], ladder.on(ladder.top)
    counted = [_counted(ladder, size, options.count) for size in top]
    planned = [ladder.steps(size, ladder.top) * ladder.recipe.batch.tokens for size in top]
    rows = [
        {"params": n, "tokens": d, "flops": float(d * size.flops), "loss_nats": 1.0}
        for size, n, d in zip(top, counted, planned)
    ]
    ahead = predict(law, from_rows(rows))
    kept = ("params", "tokens", "flops", "predicted_nats", "low_nats", "high_nats")
    made = [{"size": size.name, **{k: row[k] for k in kept}} for size, row in zip(top, ahead.rows())]
    k = per_token(points)
    try:
        by_parabolas: float | None = power(rung_bests(points)).best_params(flops)
    except ValueError:
        by_parabolas = None
    return {
        "rows": made,
        "flops": flops,
        "runs": len(points),
        "law": law.law.as_json(),
        "best_params": law.law.best_params(flops, k),
        "best_loss_nats": law.law.best_loss(flops, k),
        "best_params_by_parabolas": by_parabolas,
    }


def _counted(ladder: Ladder, size: Any, count: str) -> float:
    from assay.study.trial import sizes

    row = {**sizes(size.spec), "tokens": 1, "loss_nats": 1.0}
    return float(from_rows([row], count).params[0])


def concluded(ladder: Ladder, results: Sequence[Result], told: Plain, options: Options) -> Plain:
    """What `analyse` finds in all rungs, with `top` (the prediction beside what was found), `rates` (each size's best
    rate and their power law) and `batches` (noise scales and their power law in the loss)."""
    rows = of_results(r for r in results if r.study in {ladder.study(i) for i in range(ladder.top + 1)})
    findings = analyse(rows, options, ladder.name)
    findings["top"] = _top(ladder, results, told, options)
    findings["rates"] = _rates(ladder, results)
    findings["batches"] = batches(rows)
    findings["shift"] = _shift(findings)
    return dict(json.loads(json.dumps(findings)))  # lists where there were tuples, as a reader of the file has them


def _shift(findings: Plain) -> float | None:
    """By how much the exponent of the best size is larger without the embedding than with it."""
    both = [findings["exponents"].get(count, {}).get("approach2") for count in ("without_embedding", "total")]
    return both[0] - both[1] if None not in both else None


def _top(ladder: Ladder, results: Sequence[Result], told: Plain, options: Options) -> Plain | None:
    """The misses are predicted minus found, in nats; None until the rung is run."""
    ran = {str(r.arm): r for r in results if r.study == ladder.study(ladder.top) and r.kind == "trial" and r.seed == 0}
    rows = []
    for row in told["rows"]:
        found = ran[row["size"]].values.get("loss_nats") if row["size"] in ran else None
        if isinstance(found, int | float):
            rows.append({**row, "loss_nats": float(found), "miss_nats": row["predicted_nats"] - float(found)})
    if not rows:
        return None
    points = from_rows(rung_points(ladder, results, ladder.top), options.count)
    best = parabola(points)
    out = {**told, "rows": rows, "worst_miss_nats": max(abs(r["miss_nats"]) for r in rows)}
    out["mean_miss_nats"] = math.fsum(abs(r["miss_nats"]) for r in rows) / len(rows)
    lowest = min(r["loss_nats"] for r in rows)
    out["found_params"], out["found_loss_nats"] = (best.params, best.loss) if best and best.inside else (None, lowest)
    out["best_miss_nats"] = told["best_loss_nats"] - out["found_loss_nats"]
    return out


def _rates(ladder: Ladder, results: Sequence[Result]) -> Plain | None:
    """In recipe.optimizer.lr turned into the rate that the optimiser had."""
    curves, optimizer = sweep_curves(ladder, results), ladder.recipe.optimizer
    rows = [
        {
            "size": size.name,
            "params": size.params,
            "rate": optimizer.model_copy(update={"lr": best}).peak(size.spec.d_model),
            "at_an_end": curves[size.name].is_at_an_end,
        }
        for size in ladder.sizes
        if size.name in curves and (best := curves[size.name].optimum) is not None
    ]
    return {"rows": rows, "law": power_or_none(rows, "params", "rate")} if rows else None


def batches(rows: Sequence[Plain]) -> Plain | None:
    """The noise scale against the loss: it grows as loss falls (Kaplan et al. 2020, arXiv 2001.08361, equation 1.4)."""
    found = [
        {"loss_nats": float(row["loss_nats"]), "noise_scale_tokens": float(row["noise_scale_tokens"])}
        for row in rows
        if isinstance(row.get("noise_scale_tokens"), int | float)
    ]
    law = power_or_none(found, "loss_nats", "noise_scale_tokens")
    return {"rows": found, "law": law} if found else None


def power_or_none(rows: Sequence[Plain], x: str, y: str) -> Plain | None:
    try:
        scale, exponent = rate_law([row[x] for row in rows], [row[y] for row in rows])
    except ValueError:
        return None
    return {"scale": scale, "exponent": exponent}


def settings(plan: Plain, findings: Plain | None) -> Plain | None:
    """Learning rate and batch in tokens for a plan, from what a ladder found; None where it found neither.

    rate: the optimiser's own, from the sweeps' power law in size. The batch is the noise scale at the planned loss: a
    batch of that many tokens takes twice the steps of an unlimited one and half of its tokens (McCandlish et al. 2018,
    arXiv 1812.06162, equation 2.7).
    """
    laws = {name: ((findings or {}).get(name) or {}).get("law") for name in ("rates", "batches")}
    if not any(laws.values()):
        return None
    at = {"rates": plan["params"]["value"], "batches": plan["loss_nats"]["value"]}
    said = {name: law["scale"] * at[name] ** law["exponent"] if law else None for name, law in laws.items()}
    return {"rate": said["rates"], "batch_tokens": said["batches"]}


def found_in(source: Path) -> Plain | None:
    """The findings of a ladder's folder or results.jsonl; None for any other runs."""
    path = source / "results.jsonl" if source.is_dir() else source
    return said(read_results(path), FINDINGS) if path.suffix == ".jsonl" and _is_results(path) else None


def _is_results(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        return file.readline().startswith('{"kind":')


def said(results: Iterable[Result], what: str) -> Plain | None:
    """What was written under this name, whole."""
    for r in results:
        if r.kind == "measure" and r.arm is None and r.values["what"] == what:
            return dict(r.values["rows"][0])  # type: ignore[arg-type,index]
    return None


def _line(session: Session, ladder: Ladder, what: str, found: Plain) -> Result:
    """Of the whole ladder: a measure without an arm."""
    return _about(session, ladder, "measure", {"what": what, "rows": [found]})


def _about(session: Session, ladder: Ladder, kind: Any, values: Plain) -> Result:
    labels: Plain = {"version": __version__, "commit": commit(), "device": session.device}
    return Result(kind=kind, study=ladder.name, threads=session.pool.threads, **labels, values=values)


def _conclude(ladder: Ladder, folder: Folder, session: Session, told: Plain, findings: Plain) -> None:
    """Every line that is not a run's, written afresh; the prediction as it was."""
    about = {
        "title": ladder.spec.title,
        "question": ladder.spec.question,
        "command": session.command,
        "arms": [],
        "recipe": to_yaml(json.loads(ladder.recipe.model_dump_json())),
        "flops": list(ladder.rungs.flops),
        "sizes": [{"name": s.name, "params": s.params, "spec_digest": s.digest} for s in ladder.sizes],
    }
    lines = [_about(session, ladder, "study", about), _line(session, ladder, PREDICTION, told)]
    if machine := session.environment():
        lines.insert(0, _about(session, ladder, "environment", machine))
    claims = [_about(session, ladder, "claim", found) for found in judged(ladder.spec.claims, findings)]
    folder.rewrite([*lines, *claims, _line(session, ladder, FINDINGS, findings)])

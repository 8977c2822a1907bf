"""Studies: run one, read what it found, list what ships.

`assay study run STUDY --out DIR` plans the trials, runs them side by side (one process a core), and ends with a report
in DIR. Run again with the same DIR it goes on where it stopped. A study is a shipped name or a YAML file of yours.
"""

from __future__ import annotations

import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.common import Json, Overrides, Part, console, emit_json, fail, load_parts, parse_overrides

if TYPE_CHECKING:
    from assay.study.run import Finished
    from assay.study.runners.remote import Runner

ENGINES = {"local": None, "ray": "ray", "slurm": "submitit"}
"""Where trials run, and the package that it needs."""

app = typer.Typer(no_args_is_help=True)


@app.command()
def run(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A shipped study or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Results and report; run again to resume.")],
    changes: Overrides = None,
    budget: Annotated[str, typer.Option(help="smoke (90 s), quick (12 minutes) or full (2 hours).")] = "quick",
    workers: Annotated[int, typer.Option(help="Trials side by side; 0 is one for each core.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print arms, tokens and expected time.")] = False,
    engine: Annotated[str, typer.Option(help="Where trials run: local, ray or slurm.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="ray: host:port or auto; slurm: a partition, or local for processes here.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Of each trial, with ray or slurm.")] = 0,
    part: Part = None,
    json: Json = False,
) -> None:
    """Run a study, or go on with it, and write its report."""
    if workers < 0:
        raise ValueError(f"--workers {workers}; accepted: 0 (one for each core) or more")
    load_parts(part)
    from assay.study.materials import materials
    from assay.study.plan import Request
    from assay.study.rate import training_rate
    from assay.study.run import Session, foreseen, run_study
    from assay.study.runners.local import Pool
    from assay.study.spec import load_study
    from assay.study.tables import Live, plan_table

    name, spec = load_study(study)
    request = Request(name, spec, budget, parse_overrides(changes))
    about = console()
    pool = Pool(workers=workers, parts=tuple(str(p.resolve()) for p in part or ()))
    session = Session(
        materials(rate=training_rate),
        pool,
        command=shlex.join(["assay", *sys.argv[1:]]),
        watch=Live,
        note=lambda text: about.print(text, soft_wrap=True),
        environment=measured_machine,
        runner=runner_of(engine, address, gpus),
    )
    if dry_run:
        plan, left = foreseen(request, out, session)
        console_out = _stdout()
        console_out.print(plan_table(plan, session.materials, pool.size, left))
        if json:
            counts = {"runs": len(plan.trials), "left": len(left), "tokens": sum(t.tokens for t in plan.trials)}
            emit_json({**counts, "scale": plan.scale})
        return
    conclude(run_study(request, out, session), out, json)


def runner_of(engine: str, address: str | None, gpus: int) -> Runner:
    """What `--engine` names. A package that is missing is named before anything is planned."""
    from assay.study.runners.local import run_trials

    if engine not in ENGINES:
        fail(f"--engine {engine!r}; accepted: {', '.join(ENGINES)}")
    if gpus < 0:
        fail(f"--gpus {gpus}; accepted: 0 or more")
    if engine == "local":
        if address is not None or gpus:
            fail("--address and --gpus are of --engine ray and slurm")
        return run_trials
    import_module(ENGINES[engine] or "")
    if engine == "ray":
        from assay.study.runners.ray import OnRay

        return OnRay(address, gpus)
    from assay.study.runners.slurm import OnSlurm

    return OnSlurm(address, gpus)


def measured_machine() -> dict[str, Any]:
    from assay.measure.machine import environment

    console().print("measuring this machine", soft_wrap=True)
    return environment()


def _stdout() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def conclude(finished: Finished, out: Path, json: bool) -> None:
    """The verdicts and claims at the terminal, and the path of the report."""
    from assay.report import write_report

    report = write_report(out)
    verdicts = [r for r in finished.results if r.kind == "verdict"]
    claims = [r for r in finished.results if r.kind == "claim"]
    show(verdicts, claims)
    for study in finished.results:
        if study.kind == "study" and study.values.get("note"):
            _stdout().print(f"{study.study}: {study.values['note']}", markup=False, soft_wrap=True)
    for failed in finished.failed:
        console().print(f"failed: {failed.trial.name}: {failed.why}", markup=False, soft_wrap=True)
    print(f"report: {report.resolve()}")
    if json:
        notes = {r.study: r.values["note"] for r in finished.results if r.kind == "study" and r.values.get("note")}
        outcomes = [str(c.values["outcome"]) for c in claims]
        emit_json(
            {
                "report": str(report),
                "results": str(out / "results.jsonl"),
                "verdicts": [{"study": v.study, "arm": v.arm, **v.values} for v in verdicts],
                "notes": notes,
                "claims": {name: outcomes.count(name) for name in dict.fromkeys(outcomes)},
                "failed": [f.trial.name for f in finished.failed],
            }
        )
    if finished.failed:
        raise typer.Exit(1)


def show(verdicts: list[Any], claims: list[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("study", "arm", "difference", "interval", "verdict", header_style="bold", pad_edge=False)
    for v in verdicts:
        at = v.values
        known = at.get("delta") is not None
        low, high = at.get("low"), at.get("high")
        interval = f"{low:+.3f} to {high:+.3f}" if low is not None and high is not None else ""
        table.add_row(v.study, Text(str(v.arm)), f"{at['delta']:+.3f}" if known else "", interval, at["verdict"])
    screen = _stdout()
    screen.print(table)
    told = Table("claim", "outcome", header_style="bold", pad_edge=False)
    for c in claims:
        told.add_row(Text(f"{c.study}: {c.values['text']}"), str(c.values["outcome"]))
    if claims:
        screen.print(told)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    json: Json = False,
) -> None:
    """Write DIR/report.html afresh from DIR/results.jsonl."""
    from assay.report import write_report

    path = write_report(folder)
    print(f"report: {path.resolve()}")
    if json:
        emit_json({"report": str(path)})


@app.command(name="list")
def list_(json: Json = False) -> None:
    """The studies that ship, with their questions."""
    from rich.table import Table
    from rich.text import Text

    from assay.spec.load import read_mapping, shelf

    rows = []
    for name, path in shelf("studies").items():
        tree = read_mapping(path)
        rows.append({"name": name, "title": tree.get("title", ""), "question": tree.get("question", "")})
    if json:
        emit_json({"studies": rows})
        return
    table = Table("study", "question", header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(row["name"], Text(row["question"] or row["title"]))
    _stdout().print(table)

"""Trials somewhere else, and what they said, less what differs between two runs."""

from pathlib import Path
from typing import Any

from assay.spec.result import Result, read_results
from assay.study.plan import Plan
from assay.study.runners.folder import Folder
from assay.study.runners.local import Failed, Pool
from assay.study.runners.remote import Runner

TOY = "tests.study.toy_trials:"


def ran(path: Path, plan: Plan, runner: Runner, function: str = "run_trial") -> list[Failed]:
    with Folder(path) as folder:
        folder.bind(plan.digest, {"study": plan.name, "budget": plan.budget})
        return runner(plan.trials, folder, Pool(2, TOY + function))


def lines(path: Path) -> list[dict[str, Any]]:
    """Without what differs between two runs: the process and where its parts lie."""
    found = [r for r in read_results(path / "results.jsonl") if r.kind in ("trial", "measure")]
    return sorted((_plain(r) for r in found), key=str)


def _plain(r: Result) -> dict[str, Any]:
    kept = {k: v for k, v in r.values.items() if k not in ("pid", "parts", "threads")}
    return {**r.model_dump(), "values": kept}

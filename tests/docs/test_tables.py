"""The published tables say what the committed Result lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from assay.spec.result import dumps, read_results

ROOT = Path(__file__).parents[2]


def test_the_published_tables_are_the_results() -> None:
    run = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_number_of_the_front_page_is_the_difference_of_the_means_of_its_runs() -> None:
    """Recomputed from the runs, by hand: the first verdict that the table shows. Five shared seeds or more are paired,
    fewer are pooled."""
    results = read_results(ROOT / "docs" / "results" / "tour.jsonl")
    losses: dict[str, dict[int, float]] = {}
    for r in results:
        if r.kind == "trial" and r.study == "baseline":
            losses.setdefault(str(r.arm), {})[int(str(r.seed))] = r.values["loss_nats"]
    arm, base = losses["no-residual"], losses["swiglu"]
    paired = sorted(arm.keys() & base.keys())
    if len(paired) < 5:
        delta = sum(arm.values()) / len(arm) - sum(base.values()) / len(base)
    else:
        delta = sum(arm[seed] - base[seed] for seed in paired) / len(paired)
    line = next(x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith("| baseline | No residual"))
    assert f"{delta:+.3f}" in line


def test_a_page_with_results_of_its_own_shows_them() -> None:
    """The mean of the seeds' differences, and the sizes of both arms, by hand from the page's own file."""
    results = read_results(ROOT / "docs" / "results" / "masks.jsonl")
    page = (ROOT / "docs" / "learnings" / "masks.md").read_text()
    for study, arm, title in (("continuation", "prefix", "Prefix"), ("infilling", "bidirectional", "Bidirectional")):
        runs = [r for r in results if r.kind == "trial" and r.study == study]
        mean = {a: [r.values["loss_nats"] for r in runs if r.arm == a] for a in ("causal", arm)}
        delta = sum(mean[arm]) / len(mean[arm]) - sum(mean["causal"]) / len(mean["causal"])
        assert f"| {study} | {title} | Causal | {delta:+.3f} |" in page


def test_runs_of_two_commits_are_no_page(tmp_path: Path) -> None:
    one, two = read_results(ROOT / "docs" / "results" / "masks.jsonl")[:2]
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file, line in zip(files, (one, two.model_copy(update={"commit": "other"})), strict=True):
        file.write_text(dumps(line) + "\n", encoding="utf-8")
    command = [sys.executable, "docs/tables.py", "--take", ",".join(map(str, files)), str(tmp_path / "page")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2, run.stdout + run.stderr
    assert f"runs of commits {one.commit}, other; accepted: of one" in run.stderr
    assert not (tmp_path / "page.jsonl").exists()


@pytest.mark.parametrize("name", ["tour", "masks"])
def test_the_results_are_small_enough_to_be_text_in_the_repository(name: str) -> None:
    assert (ROOT / "docs" / "results" / f"{name}.jsonl").stat().st_size < {"tour": 1_000_000, "masks": 200_000}[name]

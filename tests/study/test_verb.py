"""Studies by command and from Python: a real study of two tiny arms, and what bad input is told."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from assay.cli.main import main
from assay.spec.load import load_model, validate
from assay.spec.model import ModelSpec
from assay.spec.result import read_results
from assay.train.recipe import Recipe

TINY = {
    "title": "Tiny",
    "question": "Does it run?",
    "base": {
        "d_model": 16,
        "vocab": 256,
        "layers": 1,
        "context": 32,
        "positions": {"main": "rope"},
        "blocks": {
            "b": {"mixer": {"kind": "gqa", "heads": 2, "position": "main"}, "ffn": {"kind": "gated", "width": 16}}
        },
    },
    "recipe": {
        "data": {"kind": "generated"},
        "batch": {"rows": 2, "length": 32},
        "tokens": 1024,
        "evaluation": {"tokens": 256, "points": 1},
    },
    "arms": {"rope": {"role": "base"}, "none": {"model.blocks.*.mixer.position": None}},
    "measurements": [{"name": "extrapolation", "ratios": [1, 2], "windows": 2, "only": {"seeds": 1}}],
    "seeds": 2,
    "budgets": {"smoke": {"sweep": {"rates": [0.004, 0.016], "arms": ["rope"]}}},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


SCRIPT = """
import sys, json
import assay

if __name__ == "__main__":
    found = assay.study(sys.argv[1], out=sys.argv[2], budget="smoke", workers=1, **{"recipe.tokens": 512})
    print(json.dumps([[r.kind, r.arm, r.seed] for r in found]))
"""


def test_a_study_from_python(tiny: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "go.py", tmp_path / "out"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, tiny, out], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    results = read_results(out / "results.jsonl")
    assert found == [[r.kind, r.arm, r.seed] for r in results] and (out / "report.html").stat().st_size > 1000
    trials = {(r.arm, r.seed): r for r in results if r.kind == "trial"}
    assert set(trials) == {(arm, seed) for arm in ("rope", "none") for seed in (0, 1)}
    assert {r.values["tokens"] for r in trials.values()} == {512}
    model = validate(ModelSpec, TINY["base"], "base")
    measured = [r for r in results if r.kind == "measure"]
    assert [(r.arm, r.seed) for r in measured] == [("rope", 0), ("none", 0)]
    # The same training, done here.
    from assay.train.loop import train

    recipe = {**TINY["recipe"], "tokens": 512, "seed": 1}  # type: ignore[dict-item]
    outcome = train(model, validate(Recipe, recipe, "recipe")).evaluation
    assert outcome is not None and trials["rope", 1].values["loss_nats"] == pytest.approx(outcome.loss_nats, rel=1e-5)
    (swept,) = [r for r in results if r.kind == "sweep" and r.seed is None]
    assert swept.values["learning_rate"] == [0.004, 0.016]
    assert swept.values["loss_nats"][0] == trials["rope", 0].values["loss_nats"]  # type: ignore[index]


def test_the_package_is_still_a_package() -> None:
    import assay.study.spec

    assert assay.study.spec.load_study("tour")[0] == "tour" and callable(assay.study)


def _refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one message of a command that ends with exit status 2."""
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.out == "" and len(said.err.strip().splitlines()) == 1
    return said.err


BAD: list[tuple[tuple[str, ...], str]] = [
    (("tuor",), "tuor: no such file, and no shipped name (did you mean 'tour'?)"),
    (("tiny", "--budget", "huge"), "budget 'huge'; accepted: smoke, quick, full"),
    (("tiny", "--workers", "-1"), "--workers -1; accepted: 0"),
    (("tiny", "recipe.tokns=4"), "tokns: unknown field (did you mean 'tokens'?)"),
    (("tiny", "model.blocks.zz.mixer.heads=4"), "'zz' matches nothing; accepted here: b, *"),
    (("tiny", "seeds=4"), "an override begins with model. or recipe."),
    (("tiny", "recipe.tokens=many"), "tokens"),
]


@pytest.mark.parametrize("words,message", BAD)
def test_bad_requests(
    words: tuple[str, ...], message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [str(tiny) if word == "tiny" else word for word in words]
    assert message in _refused(capsys, "study", "run", *named, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "results.jsonl").exists()


FILES: list[tuple[str, str]] = [
    ("title: [", "not valid YAML"),
    ("- a\n- b\n", "a YAML mapping is expected"),
    ("title: x\nbase: lab-64\nrecipe: smoke\narmz: {}\n", "armz: unknown field (did you mean 'arms'?)"),
    ("title: x\nbase: lab-64\n", "recipe: missing"),
    ("title: x\nbase: lab-65\nrecipe: smoke\n", "lab-65: no such file"),
    ("title: x\nbase: lab-64\nrecipe: smoke\nmeasurements: [latncy]\n", "did you mean 'latency'"),
    ("title: x\nstages: [baseline, nowhere]\n", "nowhere: no such file"),
]


@pytest.mark.parametrize("text,message", FILES)
def test_bad_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert message in _refused(capsys, "study", "run", path, "--out", tmp_path / "out")


def test_folders_that_are_taken(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use by another run" in _refused(capsys, "study", "run", tiny, "--out", out)
    (out / "plan.json").write_text('{"digest": "0123456789abcdef", "study": "other", "budget": "full", "scale": 1.0}')
    said = _refused(capsys, "study", "run", tiny, "--out", out)
    assert "another study's plan (other, full: 0123456789abcdef)" in said
    (tmp_path / "file").write_text("")
    assert "is a file" in _refused(capsys, "study", "run", tiny, "--out", tmp_path / "file")
    assert "does not exist" in _refused(capsys, "study", "report", tmp_path / "nowhere")


def test_a_dry_run_trains_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "run", str(tiny), "--out", str(tmp_path / "out"), "--budget", "smoke", "--dry-run", "--json"])
    said = capsys.readouterr().out
    # Two arms with two seeds; of the sweep's two rates one is the recipe's own.
    assert json.loads(said.splitlines()[-1]) == {"runs": 5, "left": 5, "tokens": 5 * 1024, "scale": 1.0}
    assert "sweep of 2" in said and not (tmp_path / "out").exists()


def test_shipped_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "list", "--json"])
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])["studies"]
    assert {"baseline", "tour"} <= {row["name"] for row in listed} and all(row["question"] for row in listed)
    assert load_model("lab-64").layers == 2

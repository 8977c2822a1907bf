"""The wheel holds all that the package needs, and works outside of the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from assay import __version__
from tests.project.source import ROOT

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    names = [name for name in ("assay", "pyproject.toml", "LICENSE", "README.md") if (ROOT / name).exists()]
    run("tar", "-C", ROOT, "--exclude=__pycache__", "-cf", folder / "source.tar", *names, cwd=folder)
    (folder / "source").mkdir()
    run("tar", "-C", folder / "source", "-xf", folder / "source.tar", cwd=folder)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "-w", folder, folder / "source", cwd=folder)
    return next(folder.glob("assay-*.whl"))


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "assay").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("assay/")}
    assert inside == ours


def test_the_installed_command_runs_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment that borrows this one's dependencies, but not its (editable) assay."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-deps", "--no-index")
    run(*pip, "--ignore-installed", wheel, cwd=tmp_path)
    where = run(home / "bin" / "python", "-c", "import assay; print(assay.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(home)
    assert run(home / "bin" / "assay", "--version", cwd=tmp_path) == f"assay {__version__}\n"
    assert "parts" in run(home / "bin" / "assay", "--help", cwd=tmp_path)
    table = json.loads(run(home / "bin" / "assay", "parts", "--json", cwd=tmp_path).splitlines()[-1])
    assert "rope" in {row["kind"] for row in table["parts"]}
    tour = ("study", "run", "tour", "--budget", "smoke", "--out", tmp_path / "tour", "recipe.tokens=4096")
    assert f"report: {tmp_path / 'tour' / 'report.html'}" in run(home / "bin" / "assay", *tour, cwd=tmp_path)

"""What the verbs share: devices, extras, progress."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from assay.cli.common import console, install_hint, pick_device, progress
from assay.cli.main import main
from tests.project.source import ROOT


def test_a_device_that_is_missing_is_refused_by_name() -> None:
    missing = [
        name for name, found in (("cuda", torch.cuda.is_available()), ("mps", torch.mps.is_available())) if not found
    ]
    for name in missing:
        with pytest.raises(ValueError, match=rf"--device {name}: not available.*available: .*cpu"):
            pick_device(name)
    with pytest.raises(ValueError, match=r"'tpu'.*accepted: auto, cpu, cuda, mps"):
        pick_device("tpu")


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch<3,>=2.8",
        'lm-eval>=0.4.8; extra == "dev"',
        'lm-eval>=0.4.8; extra == "hf"',
        "fastapi>=0.115; extra == 'serve'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert install_hint("lm_eval.api") == "pip install 'assay[hf]'"
    assert install_hint("fastapi") == "pip install 'assay[serve]'"
    assert install_hint("torch") is None
    assert install_hint("nothing") is None


def test_progress_goes_to_stderr_and_is_silent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bar:
        bar.advance(bar.add_task("work", total=2))
    console().print("told")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "told\n")


GOOD = '''
from typing import Literal
from assay.spec.base import NormSpec

class Mine(NormSpec):
    """A norm of my own.

    Me 2026.
    """

    kind: Literal["cli_mine"] = "cli_mine"
'''


def test_a_users_part_stands_in_the_table(tmp_path: Path) -> None:
    """In a process of its own: a registered part stays registered."""
    file = tmp_path / "mine.py"
    file.write_text(GOOD)
    command = [sys.executable, "-m", "assay", "parts", "--part", str(file), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.splitlines()[-1])
    mine = next(row for row in found["parts"] if row["kind"] == "cli_mine")
    assert (mine["slot"], mine["title"], mine["paper"]) == ("norms", "A norm of my own.", "Me 2026.")


@pytest.mark.parametrize(("text", "named"), [("1 / 0", "ZeroDivisionError"), ("x = 1", "no part"), (None, "no file")])
def test_a_part_file_that_cannot_be_used_is_named(
    text: str | None, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.py"
    if text is not None:
        file.write_text(text)
    assert main(["parts", "--part", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert str(file) in err and named in err


def test_parts_lists_every_file_of_every_slot(capsys: pytest.CaptureFixture[str]) -> None:
    """As many modules as there are files, and every one with a title."""
    assert main(["parts", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]
    modules = {row["module"] for row in found}
    files = {f"assay.parts.{p.parent.name}.{p.stem}" for p in (ROOT / "assay/parts").glob("*/[!_]*.py")}
    assert modules == files
    assert all(row["title"] for row in found)
    assert main(["parts"]) == 0
    shown = capsys.readouterr().out
    assert all(row["kind"] in shown for row in found)

"""A task in a user's own file: found by its kind, asked by the verb, and gone with its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ECHO = '''
from typing import Literal
from pydantic import Field
from assay.data.tasks.base import Dice, Examples, Task

class Echo(Task):
    """The answer is the symbol itself."""
    kind: Literal["{kind}"] = "{kind}"
    length: int = Field(8, ge=2)
    vocab = property(lambda self: 4)
    floor = property(lambda self: 0.25)
    def draw(self, rows, seed, first=0):
        x = Dice(rows, first, "echo", seed).below("x", self.length, 4)
        return Examples(x, x)
    def solve(self, inputs):
        return inputs
    def shortcuts(self):
        return {{}}
    def longer(self, factor):
        return type(self)(length=self.length * factor)
'''


def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "assay", "probe", "probe-attention", *arguments, "--json"]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_file_adds_a_task(tmp_path: Path) -> None:
    path = tmp_path / "echo_task.py"
    path.write_text(ECHO.format(kind="echo"))
    done = probe("--task", "echo", "--part", str(path), "--steps", "40", "recipe.batch.rows=8", "task.length=6")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["task"] == {"kind": "echo", "length": 6}
    assert found["accuracy"] > 0.99 and found["floor"] == 0.25
    without = probe("--task", "echo")
    assert without.returncode == 2 and "unknown task 'echo'" in without.stderr


def test_a_kind_that_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "echo_task.py"
    path.write_text(ECHO.format(kind="parity"))
    done = probe("--task", "parity", "--part", str(path))
    assert done.returncode == 2 and "kind 'parity' is already taken" in done.stderr


def test_the_laws_of_parts_are_not_for_tasks(tmp_path: Path) -> None:
    path = tmp_path / "echo_task.py"
    path.write_text(ECHO.format(kind="echo"))
    command = [sys.executable, "-m", "assay", "parts", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "defines tasks only" in done.stderr

"""A package imports only from packages to its left, wherever in a file the import stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.project.source import ROOT, Source, sources

ARROW = (
    ("spec",),
    ("ops",),
    ("parts",),
    ("model",),
    ("cost", "cache", "passes"),
    ("conform",),
    ("data",),
    ("hub",),
    ("train", "engine"),
    ("tune",),
    ("measure",),
    ("study",),
    ("laws", "simulate"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ARROW) for name in names}
FOLDERS = frozenset({*RANK, "report", "shelf"})
NO_TORCH = frozenset({"spec", "report"})
TORCH = frozenset({"torch", "transformers", "safetensors.torch"})


def allowed(package: str, target: str) -> bool:
    """Whether a file of `package` may import the package `target`."""
    if package == target or package == "":
        return True
    if package == "report":
        return target == "spec"
    if target == "report":
        return package == "cli"
    return RANK.get(target, len(ARROW)) < RANK[package]


def imported(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every module that an import statement may load, `from a import b` being both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)


def problems(source: Source) -> list[str]:
    found = []
    for node, name in imported(source.tree):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "":
            found.append(source.at(node, "a relative import; write the whole name"))
        elif top == "assay" and target in FOLDERS and not allowed(source.package, target):
            found.append(source.at(node, f"{source.package} must not import assay.{target}"))
        elif source.package in NO_TORCH and (top in TORCH or any(name.startswith(t) for t in TORCH)):
            found.append(source.at(node, f"{source.package} must not import {top}: it runs without torch"))
    return found


def test_the_arrow_holds() -> None:
    found = [problem for source in sources("assay") for problem in problems(source)]
    assert not found, "\n".join(found)


def test_every_package_stands_on_the_arrow() -> None:
    packages = {path.name for path in (ROOT / "assay").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages <= FOLDERS, f"not on the arrow: {sorted(packages - FOLDERS)}"


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("assay/ops/a.py", "import math\nimport assay.parts.base", 2),
        ("assay/spec/a.py", "def f():\n    from assay.ops import step", 2),
        ("assay/cost/a.py", "from assay import cache", 1),
        ("assay/engine/a.py", "if True:\n\n    from assay.train.loop import train as t", 3),
        ("assay/report/a.py", "from assay.study import plan", 1),
        ("assay/report/a.py", "import torch.nn", 1),
        ("assay/spec/a.py", "from torch import Tensor", 1),
        ("assay/study/a.py", "from assay.report.page import render", 1),
        ("assay/parts/mixers/a.py", "from ..base import Mixer", 1),
    ],
)
def test_a_planted_import_is_found_with_its_line(path: str, text: str, line: int) -> None:
    found = problems(Source.parse(path, text))
    assert len(found) == 1
    assert found[0].startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "assay/parts/mixers/a.py",
            "from assay.parts.base import Mixer\nfrom assay.ops.step import Step\nimport torch",
        ),
        ("assay/engine/a.py", "from assay.cache.pages import Pages\nfrom assay.cost import bill"),
        ("assay/cli/a.py", "from assay.report.page import write_report\nfrom assay import __version__"),
        ("assay/api.py", "import assay.cli.main"),
    ],
)
def test_what_points_left_is_let_through(path: str, text: str) -> None:
    assert problems(Source.parse(path, text)) == []

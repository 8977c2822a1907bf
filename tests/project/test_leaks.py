"""What ships names no machine's paths and no registry's host: where packages come from is the installer's business."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project.source import ROOT

FOLDERS = ("assay", "tests", "docs", ".ci", ".github")
BINARY = frozenset({".png", ".safetensors", ".npz", ".npy", ".gguf", ".pyc", ".so", ".bin"})
# Written in pieces, so that this file does not find itself.
PATHS = ("wo" + "rk/", "ro" + "ot/", "tmp/bash_" + "jobs", "opt/py" + "pi")
HOSTS = (
    "py" + "pi.org",
    "pythonhos" + "ted.org",
    "download.py" + "torch.org",
    "debi" + "an.org",
    "npm" + "js.org",
    "proxy.gol" + "ang.org",
)
LEAK = re.compile(
    "|".join([rf"(?<![\w./-])/{re.escape(p)}" for p in PATHS] + [re.escape(h) for h in HOSTS] + [r"\.\./sha" + r"red"])
)


def leaks(where: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        for found in LEAK.finditer(line):
            yield f"{where}:{number}: {found.group()}"


def shipped() -> Iterator[Path]:
    """The files at the root and below the project's folders, without what tools leave behind."""
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix not in BINARY and "__pycache__" not in path.parts:
                yield path


def test_no_shipped_file_names_a_machine_or_a_registry() -> None:
    found = [
        leak
        for path in shipped()
        for leak in leaks(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "see /" + PATHS[0] + "main",
        "cd /" + PATHS[1] + ".cache",
        "../sha" + "red/DESIGN.md",
        "--index-url https://" + HOSTS[2] + "/whl",
    ],
)
def test_a_planted_leak_is_found(text: str) -> None:
    assert next(iter(leaks("a.md", f"fine\n{text}"))).startswith("a.md:2: ")


@pytest.mark.parametrize(
    "text", ["a network/path", "https://example.org/" + PATHS[0], "the framework/", "shared state"]
)
def test_ordinary_text_is_let_through(text: str) -> None:
    assert list(leaks("a.md", text)) == []

"""The project's own sources, parsed once: what the ratchet tests look at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the root, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, text: str) -> Source:
        return cls(path, text, ast.parse(text))

    @property
    def package(self) -> str:
        """`parts` for assay/parts/mixers/gqa.py; empty for the files directly in assay/."""
        parts = self.path.split("/")
        return parts[1] if parts[0] == "assay" and len(parts) > 2 else ""

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Every Python file below these folders of the checkout."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return tuple(Source.parse(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in paths)


def length(node: ast.AST) -> int:
    """Lines from the first decorator to the last line."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])  # type: ignore[attr-defined]
    return node.end_lineno - first + 1  # type: ignore[attr-defined, no-any-return]

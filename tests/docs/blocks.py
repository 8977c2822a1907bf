"""Fenced blocks of the project's own pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, the line of its fence, what stands behind the fence, and its text."""

    page: str
    line: int
    info: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page that promises something; the logs tell what was."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [p for p in found if p.name != "LOG.md" and "learnings" not in p.parts and "decisions" not in p.parts]


def blocks_of(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    page = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        body = "\n".join(row.removeprefix(found["indent"]) for row in found["text"].splitlines())
        yield Block(page, line, found["info"].strip(), body + "\n")


def blocks(info: str) -> list[Block]:
    """All blocks of one kind (`python`, `bash`, `yaml`, `console`), page by page."""
    return [b for page in pages() for b in blocks_of(page) if b.info == info]

"""Code that a page quotes stands in the file it names; links inside the project lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks_of, pages

QUOTES = [b for page in pages() for b in blocks_of(page) if b.info.startswith("python quote ")]
LINK = re.compile(r"!?\[[^\]]*\]\((?P<to>[^)#\s]+)(?:#[^)]*)?\)")


def quoted(block: Block) -> bool:
    """Whether the lines stand in the file together, whatever their indentation; `...` is a gap."""
    source = [line.strip() for line in (ROOT / block.info.split()[-1]).read_text(encoding="utf-8").splitlines()]
    for piece in block.text.split("...\n"):
        lines = [line.strip() for line in piece.strip("\n").splitlines()]
        if not any(source[i : i + len(lines)] == lines for i in range(len(source))):
            return False
    return True


@pytest.mark.parametrize("block", QUOTES, ids=lambda b: b.where)
def test_a_quote_stands_in_its_file(block: Block) -> None:
    assert quoted(block), f"{block.where} quotes what {block.info.split()[-1]} does not say"


def test_a_wrong_quote_is_found() -> None:
    info = "python quote docs/examples/causal_mean.py"
    assert quoted(Block("a.md", 1, info, "class CausalMean(MixerSpec):\n...\nwidth: int = Field(ge=1)\n"))
    assert not quoted(Block("a.md", 1, info, "class CausalMean(MixerSpec):\nwidth: int = Field(ge=1)\n"))


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = [m["to"] for m in LINK.finditer(page.read_text(encoding="utf-8"))]
    dead = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    # The picture of the report is made by the tour, after this page was written.
    assert not [t for t in dead if t != "docs/images/report.png"], f"{page.name}: dead links {dead}"

"""Python on a page runs as it stands there, and prints what the page says it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks, blocks_of

PROMISE = re.compile(r"^\s*print\(.*\)  # (?P<value>.+)$")
PAGES = list(dict.fromkeys(b.page for b in blocks("python")))


def run_page(found: list[Block], capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page in order, in one namespace. A line `print(...)  # value` promises that line of output."""
    names: dict[str, object] = {"__name__": "page"}
    for block in found:
        code = compile("\n" * block.line + block.text, str(ROOT / block.page), "exec")
        capsys.readouterr()
        exec(code, names)
        printed = capsys.readouterr().out.splitlines()
        promised = [m["value"] for m in map(PROMISE.match, block.text.splitlines()) if m]
        if promised:
            assert printed == promised, f"{block.where} prints other things than it says"


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    run_page([b for b in blocks("python") if b.page == page], capsys)


def test_a_page_that_lies_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nprint(1 + 1)  # 2\n```\n\n```python\nx = 2\nprint(x + x)  # 5\n```\n")
    first, second = blocks_of(page)
    assert (first.line, second.line) == (3, 7)
    run_page([first], capsys)
    with pytest.raises(AssertionError, match=r"page\.md:7"):
        run_page([second], capsys)
    with pytest.raises(NameError):
        run_page([Block("page.md", 1, "python", "nothing\n")], capsys)

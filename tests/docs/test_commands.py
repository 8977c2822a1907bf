"""Commands on a page exist with the options they are given; the cheap ones run, and print what the page shows."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest
import typer

from assay.cli.main import group, main
from tests.docs.blocks import ROOT, Block, blocks

# Verbs that only read: they run as they stand. The others are checked against their own options.
CHEAP = ("bill", "parts", "--version", "--help")


def commands(block: Block) -> list[str]:
    """One command a line; a backslash joins lines, a comment ends one."""
    text = block.text.replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*$", "", line.removeprefix("$ ")).strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def console(block: Block) -> list[tuple[str, list[str]]]:
    """Commands after `$ `, each with the lines shown below it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        else:
            found[-1][1].append(line.rstrip())
    return found


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def parse(arguments: list[str]) -> None:
    """The verb's own parser, or its sub-verb's; raises what a user would be told."""
    root = group()
    ctx = root.make_context("assay", list(arguments))
    name, command, rest = root.resolve_command(ctx, list(arguments))
    if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        ctx = command.make_context(name, list(rest), parent=ctx)
        name, command, rest = command.resolve_command(ctx, list(rest))
    command.make_context(name, list(rest), parent=ctx)


def check(line: str) -> None:
    words = shlex.split(line)
    while "=" in words[0] and not words[0].startswith("="):  # OMP_NUM_THREADS=1 assay ...
        words = words[1:]
    program, rest = Path(words[0]).name, words[1:]
    if program == "torchrun" and rest[rest.index("-m") :][:2] == ["-m", "assay"]:
        program, rest = "assay", rest[rest.index("-m") + 2 :]
    rest = rest[: rest.index("|")] if "|" in rest else rest
    if program == "assay":
        if rest[0] in CHEAP and not {"check", "--matrix"} & set(rest):
            assert main(rest) == 0, f"fails: {line}"
        else:
            parse(rest)
    elif program == "make":
        assert {w for w in rest if "=" not in w} <= targets(), f"no such target: {line}"
    elif program in ("python", "python3") and rest[:1] and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file(), f"no such file: {line}"
    else:
        assert program in ("python", "python3", "pip", "git", "cd", "source", "pytest", "ruff", "mypy"), (
            f"unknown: {line}"
        )


LINES = [(b.where, line) for b in blocks("bash") for line in commands(b)]


@pytest.mark.parametrize(("where", "line"), LINES, ids=[f"{w} {li}" for w, li in LINES])
def test_a_command_exists(where: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(line)


@pytest.mark.parametrize("block", blocks("console"), ids=lambda b: b.where)
def test_the_console_shows_what_is_printed(
    block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line `...` stands for anything."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    for line, shown in console(block):
        assert main(shlex.split(line)[1:]) == 0
        printed = [row.rstrip() for row in capsys.readouterr().out.splitlines()]
        while shown and not shown[-1]:
            shown = shown[:-1]
        pattern = "\n".join(".*" if row == "..." else re.escape(row) for row in shown)
        assert re.fullmatch(pattern, "\n".join(printed).strip("\n"), re.DOTALL), f"{block.where}: {line} prints\n" + (
            "\n".join(printed)
        )


@pytest.mark.parametrize(
    "line",
    [
        "assay trian lab-64",
        "assay train lab-64 --receipt smoke --out runs/x",
        "assay study runs tour",
        "assay study run tour --budget quick",
        "assay bill gpt-11m --kv-dtype int2",
        "make everything",
        "python docs/nothing.py",
        "curl example.org",
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    with pytest.raises((AssertionError, ValueError, typer.TyperException)):
        check(line)


# What makes a verb of the README's walk take seconds: appended to its line.
SMALL = {
    "train": "recipe.tokens=1024 recipe.evaluation.tokens=512 recipe.evaluation.points=1",
    "generate": "--device cpu",
    "chat": "--max-new 3",
    "eval": "--rows 4",
    "bench": "--seconds 0.1 --prompt-len 8 --new-tokens 2",
}


def test_the_readme_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, generate, chat, evaluate and bench, each line as it stands with fewer tokens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("def main():\n/quit\n"))
    found = [shlex.split(line) for where, line in LINES if where.startswith("README") and line.startswith("assay ")]
    # The lines about the run that `train` made; those about a checkpoint of the reader's own need one.
    walk = [words[1:] for words in found if words[1] in SMALL and "runs/imported" not in words]
    assert [words[0] for words in walk] == list(SMALL)
    for words in walk:
        words = [str(ROOT / w) if w.startswith("assay/") else w for w in words]
        assert main([*words, *SMALL[words[0]].split()]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs/first/model.safetensors").is_file()

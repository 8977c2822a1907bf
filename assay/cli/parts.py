"""Every mechanism: its slot, its paper, and what it refuses.

A part obeys every law that it does not refuse by name. `assay parts check FILE.py` runs all laws on a mechanism of
your own; `assay parts --matrix` runs them on every shipped one and prints what each said.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.common import Json, Part, emit_json, fail, load_parts, progress

if TYPE_CHECKING:
    from assay.conform.suite import Finding
    from assay.spec.base import PartSpec

app = typer.Typer()
ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")


@app.callback(invoke_without_command=True)
def run(
    ctx: typer.Context,
    matrix: Annotated[bool, typer.Option("--matrix", help="Run every law on every part, and print the table.")] = False,
    part: Part = None,
    json: Json = False,
) -> None:
    """Every mechanism: its slot, its paper, and what it refuses."""
    if ctx.invoked_subcommand is not None:
        return
    load_parts(part)
    if matrix:
        from assay.conform.cases import every

        return conclude(examine(list(every())), json)
    found = rows()
    if json:
        emit_json({"parts": found})
    else:
        show(found)


@app.command()
def check(file: Annotated[Path, typer.Argument(metavar="FILE.py")], json: Json = False) -> None:
    """The conformance suite on the mechanisms of your own file; exit 1 when a law is broken."""
    from assay.spec import registry

    found = registry.load_file(file)
    if not found:
        fail(f"{file}: defines tasks only, and the laws are those of parts; assay probe --part {file} asks a task")
    conclude(examine(found), json)


def examine(kinds: list[type[PartSpec]]) -> list[Finding]:
    """Every law on every size of these parts, with progress on stderr."""
    from assay.conform.suite import check as laws_of

    found = []
    with progress() as bar:
        task = bar.add_task("laws", total=len(kinds))
        for kind in kinds:
            bar.update(task, description=f"{kind.slot} {kind.kind_name()}")
            found += list(laws_of(kind))
            bar.advance(task)
    return found


def conclude(found: list[Finding], json: bool) -> None:
    """A row a part and a column a law: holds, refused or broken over all its sizes; then each reason."""
    from dataclasses import asdict

    from rich.console import Console

    broken = [f for f in found if f.outcome == "broken"]
    if json:
        emit_json({"findings": [asdict(f) for f in found], "broken": len(broken)})
    else:
        console = Console(highlight=False)
        console.print(grid(found), crop=False, no_wrap=True, overflow="ignore")
        console.print("yes: holds, no: refused by name (no*: for some of its sizes), BROKEN: see below")
        for f in dict.fromkeys((f.slot, f.kind, f.law, f.outcome, f.reason) for f in found if f.reason):
            console.print(f"{f[0]} {f[1]}: {f[2]} {f[3]}: {f[4]}", markup=False)
    if broken:
        raise typer.Exit(1)


def grid(found: list[Finding]) -> Any:
    """Laws down and parts across, or turned where there are many parts."""
    from rich.table import Table

    parts = list(dict.fromkeys((f.slot, f.kind) for f in found))
    laws = list(dict.fromkeys(f.law for f in found))
    cells = {
        (p, law): mark({f.outcome for f in found if (f.slot, f.kind) == p and f.law == law})
        for p in parts
        for law in laws
    }
    if len(parts) <= 4:
        table = Table("law", *(f"{slot} {kind}" for slot, kind in parts), header_style="bold", pad_edge=False)
        for law in laws:
            table.add_row(law, *(cells[part, law] for part in parts))
        return table
    table = Table("part", *(law[:7] for law in laws), header_style="bold", pad_edge=False, box=None)
    for part in parts:
        table.add_row(" ".join(part), *(cells[part, law] for law in laws))
    return table


def mark(outcomes: set[str]) -> str:
    if "broken" in outcomes:
        return "BROKEN"
    return "yes" if outcomes == {"holds"} else "no" if outcomes == {"refuses"} else "no*"


def rows() -> list[dict[str, Any]]:
    """One record a part, by slot and kind: slot, kind, name, title, paper, refuses, module."""
    from assay.spec import registry
    from assay.spec.base import SLOTS

    return [describe(slot, kind, spec) for slot in SLOTS for kind, spec in sorted(registry.table(slot).items())]


def describe(slot: str, kind: str, spec: type[Any]) -> dict[str, Any]:
    """A part's docstring is its title (the first line) and its paper (the rest); its file's first line is its name."""
    title, _, rest = inspect.cleandoc(spec.__doc__ or "").partition("\n")
    return {
        "slot": slot,
        "kind": kind,
        "name": (sys.modules[spec.__module__].__doc__ or title).strip().partition("\n")[0],
        "title": title,
        "paper": " ".join(rest.split()),
        "refuses": dict(spec.refuses),
        "module": spec.__module__,
    }


def show(found: list[dict[str, Any]]) -> None:
    """A table on stdout: slot, kind, name with what is refused, and the number of the paper."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("slot", "kind", "what it is", "arXiv", header_style="bold", pad_edge=False)
    before = ""
    for row in found:
        about, paper = Text(row["name"]), ARXIV.search(f"{row['title']} {row['paper']}")
        for law, why in row["refuses"].items():
            about.append(f"\nrefuses {law}: {why}", style="yellow")
        table.add_row(
            "" if row["slot"] == before else row["slot"],
            Text(row["kind"], style="bold"),
            about,
            paper[0] if paper else "",
        )
        before = row["slot"]
    Console(highlight=False).print(table)
    print("Equations and fields: docs/mechanisms, or --json. --matrix: which laws each obeys.")

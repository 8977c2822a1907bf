"""Every mechanism: its slot, its paper, and what it refuses.

A part supports all laws and features that it does not refuse; the reason stands with each refusal.
"""

from __future__ import annotations

import inspect
from typing import Any

from assay.cli.common import Json, Part, emit_json, load_parts


def run(part: Part = None, json: Json = False) -> None:
    load_parts(part)
    found = rows()
    if json:
        emit_json({"parts": found})
    else:
        show(found)


def rows() -> list[dict[str, Any]]:
    """One record a part, by slot and kind: slot, kind, title, paper, refuses, module."""
    from assay.spec import registry
    from assay.spec.base import SLOTS

    return [describe(slot, kind, spec) for slot in SLOTS for kind, spec in sorted(registry.table(slot).items())]


def describe(slot: str, kind: str, spec: type[Any]) -> dict[str, Any]:
    """A part's docstring is its title (the first line) and its paper (the rest)."""
    title, _, rest = inspect.cleandoc(spec.__doc__ or "").partition("\n")
    return {
        "slot": slot,
        "kind": kind,
        "title": title,
        "paper": " ".join(rest.split()),
        "refuses": dict(spec.refuses),
        "module": spec.__module__,
    }


def show(found: list[dict[str, Any]]) -> None:
    """A table on stdout: slot, kind, and below the title the paper and what is refused."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("slot", "kind", "what it is", header_style="bold", pad_edge=False)
    before = ""
    for row in found:
        about = Text(row["title"]).append(f"\n{row['paper']}" if row["paper"] else "", style="dim")
        for law, why in row["refuses"].items():
            about.append(f"\nrefuses {law}: {why}", style="yellow")
        table.add_row("" if row["slot"] == before else row["slot"], Text(row["kind"], style="bold"), about)
        before = row["slot"]
    Console(highlight=False).print(table)

"""What a tracker is, and what it may be told. No torch, and no tracker's own package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

Kind = Literal["tensorboard", "wandb", "mlflow"]
KINDS: tuple[Kind, ...] = get_args(Kind)
USER = re.compile(r"(?<=://)[^/@\s]+@")
"""A user's name and password in an address."""


class Tracker(Protocol):
    """Is told the lines of metrics.jsonl (`assay.train.folder.Metrics`), each with its step, and then closed."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run: its folder, a name that stays the same when it is resumed, the steps that it has
    taken, and the model and the recipe by dotted path. No environment, no command line, no password in an address."""

    folder: Path
    name: str
    step: int
    fields: Mapping[str, Any]


def told(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line but its step."""
    return {name: float(value) for name, value in row.items() if name != "step"}


def public(value: Any) -> Any:
    """A leaf of a spec as trackers show it."""
    return USER.sub("", value) if isinstance(value, str) else value


def kinds(names: str) -> tuple[Kind, ...]:
    """Trackers by name, between commas. ValueError for another name, or one that is given twice."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in KINDS:
            raise ValueError(f"track: {name!r}; accepted: {', '.join(KINDS)}")
        if found.count(name) > 1:
            raise ValueError(f"track: {name!r} is given twice")
    return tuple(kind for name in found for kind in KINDS if kind == name)

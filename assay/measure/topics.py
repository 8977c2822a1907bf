"""Measurements by name: every file of this folder that defines `measure(subject, *, option=default, ...)`.

No torch here: names and options are read from the source, so that a study is checked before anything runs.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.measure.subject import Subject

FOLDER = Path(__file__).parent
Line = tuple[str, dict[str, Any]]


@cache
def topics() -> Mapping[str, tuple[str, ...]]:
    """Every measurement and the options it accepts."""
    found = {path.stem: options(path) for path in sorted(FOLDER.glob("*.py"))}
    return MappingProxyType({name: known for name, known in found.items() if known is not None})


def options(path: Path) -> tuple[str, ...] | None:
    """The keyword-only parameters of a file's `measure`; None for a file that measures nothing."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "measure":
            return tuple(arg.arg for arg in node.args.kwonlyargs)
    return None


def seconds(name: str, given: Mapping[str, Any] | None = None) -> float:
    """About how long a measurement of a small model takes: its file's `SECONDS` and what its option `seconds` says.

    A file that says neither counts as a second.
    """
    besides, default = _times(name)
    return besides + float((given or {}).get("seconds", default))


@cache
def _times(name: str) -> tuple[float, float]:
    """`SECONDS`, and the default of the option `seconds`; 0 for what is not there, unless neither is."""
    found: dict[str, float] = {}
    for node in ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SECONDS":
            found["besides"] = float(ast.literal_eval(node.value))
        elif isinstance(node, ast.FunctionDef) and node.name == "measure":
            defaults = {arg.arg: value for arg, value in zip(node.args.kwonlyargs, node.args.kw_defaults)}
            if (value := defaults.get("seconds")) is not None:
                found["default"] = float(ast.literal_eval(value))
    return (found.get("besides", 0.0), found.get("default", 0.0)) if found else (1.0, 0.0)


@cache
def alone(name: str) -> bool:
    """Whether a measurement times something, so that nothing else should run beside it: its file says `ALONE = True`.

    A name that is not known does not: `run` will refuse it.
    """
    path = FOLDER / f"{name}.py"
    nodes = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    return any(isinstance(node, ast.Assign) and ast.unparse(node) == "ALONE = True" for node in nodes)


def accepts(name: str, given: Mapping[str, Any] | None = None) -> None:
    """ValueError for a measurement that does not exist, or an option that it does not have."""
    if name not in topics():
        raise ValueError(f"measurement {name!r}{_near(name, topics())}; accepted: {', '.join(topics())}")
    known = topics()[name]
    for option in given or {}:
        if option not in known:
            raise ValueError(
                f"measurement {name}: option {option!r}{_near(option, known)}; accepted: {', '.join(known)}"
            )


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def run(name: str, subject: Subject, given: Mapping[str, Any] | None = None) -> list[Line]:
    """(kind, values) of the Results: one `measure` line with the topic's rows, or a line for each of its `failure`s."""
    accepts(name, given)
    module = importlib.import_module(f"assay.measure.{name}")
    rows: list[dict[str, Any]] = module.measure(subject, **(given or {}))
    if getattr(module, "KIND", "measure") == "failure":
        return [("failure", row) for row in rows]
    return [("measure", {"what": name, "rows": rows})]

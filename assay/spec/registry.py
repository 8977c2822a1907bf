"""The registry of parts: a scan of `assay/parts/<slot>/`, plus files a user names with --part."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from assay.spec.base import SLOTS, NestedError, PartSpec, Spec

PARTS = Path(__file__).parent.parent / "parts"
USER = "assay_user_"
"""What the module of a user's file is called, before its own name."""


@cache
def _user_parts() -> dict[str, dict[str, type[PartSpec]]]:
    return {slot: {} for slot in SLOTS}


def _specs_in(module: ModuleType) -> list[type[PartSpec]]:
    """The concrete parts that this module itself defines."""
    found = inspect.getmembers(module, lambda v: inspect.isclass(v) and issubclass(v, PartSpec))
    return [c for _, c in found if c.__module__ == module.__name__ and "kind" in c.model_fields]


@cache
def _shipped(slot: str) -> dict[str, type[PartSpec]]:
    table: dict[str, type[PartSpec]] = {}
    for path in sorted((PARTS / slot).glob("[!_]*.py")):
        for spec in _specs_in(importlib.import_module(f"assay.parts.{slot}.{path.stem}")):
            if spec.slot == slot:
                _add(table, spec, str(path))
    return table


def _add(table: dict[str, type[PartSpec]], spec: type[PartSpec], where: str) -> None:
    kind = spec.kind_name()
    if kind in table and table[kind] is not spec:
        raise ValueError(f"{where}: kind {kind!r} is already taken by {table[kind].__module__}")
    table[kind] = spec


def table(slot: str) -> dict[str, type[PartSpec]]:
    """kind -> spec class for one slot."""
    return {**_shipped(slot), **_user_parts()[slot]}


def names(slot: str) -> str:
    return ", ".join(sorted(table(slot)))


def get(slot: str, kind: object) -> type[PartSpec]:
    """The part of this slot with this kind; an unknown one raises with the accepted names and the nearest."""
    known = table(slot)
    if isinstance(kind, str) and kind in known:
        return known[kind]
    near = difflib.get_close_matches(str(kind), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise NestedError(("kind",), f"unknown {slot} kind {kind!r}{hint}; accepted: {names(slot)}")


def user_modules() -> list[ModuleType]:
    """The users' own files that are loaded."""
    return [module for name, module in list(sys.modules.items()) if name.startswith(USER)]


def user_kinds(module: ModuleType) -> list[type[Spec]]:
    """What a user's file defines under a kind that is no part: tasks, which this package does not know."""
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    kinds = [v for v in own if issubclass(v, Spec) and not issubclass(v, PartSpec) and hasattr(v, "kind_name")]
    return [v for v in kinds if "kind" in v.model_fields]


def load_file(path: str | Path) -> list[type[PartSpec]]:
    """Import a user's own mechanism. This runs the file: it is code, which is why it is asked for by a flag."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--part: no file {path}")
    name = f"{USER}{path.stem}"
    if (before := sys.modules.get(name)) is not None and Path(str(before.__file__)).resolve() != path.resolve():
        raise ValueError(f"--part {path}: a file of this name is already loaded, {before.__file__}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--part: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"--part {path}: {type(error).__name__}: {error}") from error
    found = _specs_in(module)
    if not found and not user_kinds(module):
        del sys.modules[name]
        raise ValueError(
            f"--part {path}: defines no part and no task; it needs a class derived from one of {', '.join(SLOTS)}, or "
            "from assay.data.tasks.base.Task"
        )
    for part in found:
        other = table(part.slot).get(part.kind_name(), part)
        same = [p for p in found if (p.slot, p.kind_name()) == (part.slot, part.kind_name())]
        if other.__module__ != name or len(same) > 1:
            raise ValueError(f"--part {path}: kind {part.kind_name()!r} is already taken in {part.slot}")
    for part in found:
        _user_parts()[part.slot][part.kind_name()] = part
    return found

"""Families of checkpoints: how a configuration becomes a spec, and which tensor is which parameter.

A family is a file in `families/` with

    TYPES                    the values of `model_type` it reads
    spec(config) -> tree     the model as data (a `ModelSpec` in YAML's form)
    NAMES                    our names -> theirs: `*` matches one part of a dotted name, `{a,b}` several parameters that
                             one tensor holds; the value is a name or a `Rule`. The first entry that matches counts.

and, where they are needed,

    names(spec) -> mapping   in place of NAMES, where it depends on the model
    SKIP                     their names that no parameter needs -> why
    skip(spec) -> mapping    in place of SKIP, where it depends on the model
    SAME                     their names that repeat another tensor -> that tensor; they must be equal to it
    OTHERWISE                (text, text) pairs: how names that begin or end with the first also stand in files
    hugging_face(spec) -> tree   the configuration of a spec, where this family can express it (ValueError: why not)
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from assay.hub.config import Config
from assay.hub.rules import Place, Rule
from assay.model.lm import embed_site, head_site, weight_table
from assay.spec.base import PartSpec, Site
from assay.spec.load import validate
from assay.spec.model import ModelSpec

FOLDER = Path(__file__).parent / "families"
Names = Mapping[str, str | Rule]


@cache
def families() -> Mapping[str, str]:
    """model_type -> module of the family that reads it, from the files' own TYPES, without importing them."""
    found: dict[str, str] = {}
    for path in sorted(FOLDER.glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TYPES":
                found |= dict.fromkeys(ast.literal_eval(node.value), path.stem)
    return found


def find(model_type: str, where: str = "config.json") -> ModuleType:
    """The family of a model_type. ValueError with the nearest ones, and what it takes, where nobody knows it."""
    known = families()
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, 3, 0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"{where}: model_type: {model_type!r} is not known{hint}; accepted: {', '.join(sorted(known))}. A family "
            "is one file in assay/hub/families that maps its configuration and its tensors to parts that exist; a "
            "mechanism that no part has comes first"
        )
    return importlib.import_module(f"assay.hub.families.{known[model_type]}")


@dataclass(frozen=True)
class Read:
    """A configuration, understood."""

    family: ModuleType
    spec: ModelSpec
    unread: tuple[str, ...]


def read(values: Mapping[str, Any], where: str = "config.json", tensors: Collection[str] | None = None) -> Read:
    """The model that a configuration describes. `unread`: keys that nobody asked for, to be reported."""
    config = Config(values, where, tensors)
    family = find(config.text("model_type"), where)
    tree = family.spec(config)
    return Read(family, validate(ModelSpec, tree, where), config.unread())


@dataclass(frozen=True)
class Copy:
    """One application of a rule: parameters from tensors."""

    rule: Rule
    place: Place
    theirs: tuple[str, ...]


def copies(family: ModuleType, spec: ModelSpec) -> Iterator[Copy]:
    """How every parameter of a spec is filled. ValueError names parameters that the family has no name for."""
    table = weight_table(spec)
    owners = dict(owned(spec))
    names: Names = family.names(spec) if hasattr(family, "names") else family.NAMES
    entries = [
        _Entry(_pattern(ours), ours, rule if isinstance(rule, Rule) else Rule(rule)) for ours, rule in names.items()
    ]
    filled: set[str] = set()
    for name in table:
        if name in filled:
            continue
        entry = next((e for e in entries if e.pattern.fullmatch(name)), None)
        if entry is None:
            raise ValueError(f"{family.__name__.rpartition('.')[2]}: no tensor is named for the parameter {name}")
        part, site = next(owners[place] for place in above(name) if place in owners)
        group, stars = entry.group(name)
        if missing := [other for other in group if other not in table or other in filled]:
            raise ValueError(f"{entry.rule.theirs} holds {', '.join(group)}, and there is no parameter {missing[0]}")
        place = Place(group, tuple(table[n].shape for n in group), part, site)
        yield Copy(entry.rule, place, numbered(_filled(entry.rule.theirs, stars), entry.rule.count(place)))
        filled.update(group)


def above(name: str) -> Iterator[str]:
    """What a dotted name stands in: the nearest first."""
    while name := name.rpartition(".")[0]:
        yield name


def numbered(name: str, count: int | None) -> tuple[str, ...]:
    """`#` in a name replaced by 0, 1, ..."""
    return (name,) if count is None else tuple(name.replace("#", str(i)) for i in range(count))


@dataclass(frozen=True)
class _Entry:
    """A line of a family's NAMES."""

    pattern: re.Pattern[str]
    ours: str
    rule: Rule

    def group(self, name: str) -> tuple[tuple[str, ...], list[str]]:
        """The parameters that share a tensor with `name`, and what its stars stand for."""
        match = self.pattern.fullmatch(name)
        assert match is not None
        stars = [value for key, value in match.groupdict().items() if key.startswith("s")]
        return tuple(_filled(one, stars) for one in _alternatives(self.ours)), stars


def owned(spec: ModelSpec, prefix: str = "") -> Iterator[tuple[str, tuple[PartSpec, Site]]]:
    """Every part by its dotted name."""
    special = {"embed": embed_site(spec), "head": head_site(spec)}
    for site, part in spec.parts():
        yield prefix + site.name, (part, special.get(site.name, site))
    if spec.encoder is not None:
        yield from owned(spec.encoder, f"{prefix}encoder.")


def _pattern(ours: str) -> re.Pattern[str]:
    pieces, stars = [], 0
    for piece in re.split(r"(\*|\{[^}]*\})", ours):
        if piece == "*":
            pieces.append(f"(?P<s{stars}>[^.]+)")
            stars += 1
        elif piece.startswith("{"):
            pieces.append(f"(?:{'|'.join(map(re.escape, piece[1:-1].split(',')))})")
        else:
            pieces.append(re.escape(piece))
    return re.compile("".join(pieces))


def _alternatives(ours: str) -> list[str]:
    """`a.{q,k}.*` -> `a.q.*`, `a.k.*`."""
    before, brace, rest = ours.partition("{")
    if not brace:
        return [ours]
    inside, _, after = rest.partition("}")
    return [before + one + after for one in inside.split(",")]


def _filled(pattern: str, stars: list[str]) -> str:
    """The stars of a pattern replaced in order; their names may use fewer, from the first on."""
    values = iter(stars)
    return re.sub(r"\*", lambda _: next(values), pattern)

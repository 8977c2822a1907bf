"""Which family of Hugging Face's, if any, computes exactly what a spec says: found by writing its configuration,
reading that back, and comparing the two models field by field."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from assay.hub.config import Tree
from assay.hub.family import families, read
from assay.model.lm import weight_table
from assay.parts.base import Position
from assay.parts.mixers._delta import DeltaSpec
from assay.parts.mixers.cross import Cross
from assay.parts.mixers.gqa import Gqa
from assay.parts.mixers.mla import Mla
from assay.spec.base import MixerSpec, PositionSpec, Site
from assay.spec.load import dump
from assay.spec.model import ModelSpec, StageSpec, branch_names

TRAINING = frozenset({"dropout", "balance", "z", "rate", "std"})
"""Fields, wherever they stand, that say how a model is trained and not what it computes."""

FIRST = "llama"  # what most software reads


@dataclass(frozen=True)
class Expressed:
    """A family's configuration of a spec. names: our spec's parameters -> those of the spec that the family reads."""

    family: ModuleType
    config: Tree
    spec: ModelSpec
    names: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.family.__name__.rpartition(".")[2]


def express(spec: ModelSpec) -> tuple[Expressed | None, dict[str, str]]:
    """The first family that has this model, and for those before it (all, where none has it) why they have not."""
    why: dict[str, str] = {}
    for name in writers():
        try:
            return as_family(spec, name), why
        except ValueError as error:
            why[name] = str(error)
    return None, why


def writers() -> list[str]:
    """The families that write configurations, Llama first."""
    names = sorted(set(families().values()), key=lambda name: (name != FIRST, name))
    return [name for name in names if hasattr(importlib.import_module(f"assay.hub.families.{name}"), "hugging_face")]


def as_family(spec: ModelSpec, name: str) -> Expressed:
    """ValueError names the fields that this family's model does not have."""
    family = importlib.import_module(f"assay.hub.families.{name}")
    config: Tree = family.hugging_face(spec)
    found = read(config, name)
    agree(spec, found.spec)
    assert not found.unread, f"{name}: {found.unread}: written, and not read"
    return Expressed(family, config, found.spec, parameters(spec, found.spec))


def agree(spec: ModelSpec, other: ModelSpec) -> None:
    """ValueError naming the first fields in which two specs do not compute the same."""
    ours, theirs = flat(plain(spec)), flat(plain(other))
    differ = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if differ:
        told = [f"{key}: {ours.get(key, 'nothing')!r}; {theirs.get(key, 'nothing')!r} is expected" for key in differ]
        raise ValueError("; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else ""))


def parameters(spec: ModelSpec, other: ModelSpec) -> dict[str, str]:
    """Parameters of one spec -> those of another that computes the same: positions may have other names.

    ValueError where one has a parameter that the other has not: a scheme that no layer uses may have some.
    """
    names = renamed(spec, other)
    table: dict[str, str] = {}
    for name in weight_table(spec):
        old = next((prefix for prefix in names if name.startswith(prefix)), "")
        table[name] = names.get(old, "") + name.removeprefix(old)
    if len(set(table.values())) < len(table):
        two = next(name for name, other in table.items() if list(table.values()).count(other) > 1)
        raise ValueError(f"{two}: a table of its own; one for all layers is expected")
    given = {table[n]: w.shape for n, w in weight_table(spec).items()}
    wanted = {n: w.shape for n, w in weight_table(other).items()}
    if odd := sorted(given.items() ^ wanted.items()):
        raise ValueError(
            f"{odd[0][0]}: {given.get(odd[0][0])}; {wanted.get(odd[0][0], 'no such parameter')} is expected"
        )
    return table


def renamed(spec: ModelSpec, other: ModelSpec, prefix: str = "") -> dict[str, str]:
    """What the names of a position scheme's parameters begin with, in one spec and in the other."""
    pairs = [*zip(schemes(spec, "on_embed"), schemes(other, "on_embed"), strict=True)]
    pairs += zip(used(spec), used(other), strict=True)
    found = {f"{prefix}positions.{a}.": f"{prefix}positions.{b}." for a, b in pairs}
    if spec.encoder is not None and other.encoder is not None:
        found |= renamed(spec.encoder, other.encoder, f"{prefix}encoder.")
    return found


def used(spec: ModelSpec) -> list[str]:
    """The schemes that the mixers name, layer by layer."""
    acting = schemes(spec, "on_qk", "on_read", "bias")
    parts = (branch.part for layer in range(spec.layers) for _, _, branch in spec.branches(layer))
    return [name for part in parts if (name := getattr(part, "position", None)) in acting]


def plain(spec: ModelSpec) -> Tree:
    """What a model computes, as data: the same for all spellings of it. Names of blocks and positions, how weights are
    drawn, and what acts in training alone are left out; what a field leaves to the others is written out."""
    tree: Tree = {name: getattr(spec, name) for name in ("d_model", "vocab", "context")}
    tree |= {name: settled(getattr(spec, name)) for name in ("embed", "final_norm", "head")}
    tree["positions"] = [scheme(spec.positions[n], spec.root(f"positions.{n}")) for n in schemes(spec, "on_embed")]
    tree["encoder"] = None if spec.encoder is None else plain(spec.encoder)
    tree["blocks"] = [layer_tree(spec, layer) for layer in range(spec.layers)]
    return tree


def layer_tree(spec: ModelSpec, layer: int) -> Tree:
    stages, own = spec.expand()[layer], spec.sources[layer] == layer
    block = spec.blocks[spec.plan[spec.sources[layer]]]
    found: Tree = {"like": None if own else spec.sources[layer], "linears": settled(dict(block.linears))}
    for number, stage in enumerate(stages):
        found |= stage_tree(spec, spec.site(layer), stage, (number, branch_names(stages, number)))
    return found


def stage_tree(spec: ModelSpec, site: Site, stage: StageSpec, named: tuple[int, tuple[str, ...]]) -> Tree:
    """`residual0`, `norm0`, and each branch under the name that it has in the built model."""
    number, names = named
    found: Tree = {f"residual{number}": settled(stage.residual), f"norm{number}": settled(stage.pre)}
    for name, branch in zip(names, stage.branches, strict=True):
        tree = settled(branch.part)
        if branch.mixer is not None:
            tree |= explicit(spec, branch.mixer, site.child(name))
        around = {"norm": branch.pre, "conv": branch.conv, "post": branch.post}
        norms = {f"{name}_{what}": settled(part) for what, part in around.items()}
        found |= {name: {**tree, "stage": number}, f"{name}_scale": branch.scale, **norms}
    return found


FILLED = {"width": "channels", "dt_rank": "rank", "heads": "count", "head_dim": "size"}
"""Fields that may be null -> the method of their part that then says how much it is."""


def explicit(spec: ModelSpec, part: MixerSpec, site: Site) -> Tree:
    """The fields of a mixer that say by their absence what others decide, and null for those that change no result."""
    found: Tree = {field: None for field in ("chunk", "dt_range") if hasattr(part, field)}
    for field, method in FILLED.items():
        if hasattr(part, field) and hasattr(part, method):
            found[field] = getattr(part, method)(site)
    if isinstance(part, DeltaSpec):
        found["head_dim"], found["value_dim"] = part.sizes(site)
        found |= {"k_heads": part.key_heads} if hasattr(part, "k_heads") else {}
    size: Any = part.rope_dim if isinstance(part, Mla) else found.get("head_dim")
    if isinstance(part, Gqa | Cross):
        found["kv_heads"] = part.groups
    if isinstance(part, Gqa):
        scores = settled(part.scores) | {"scale": size**-0.5 if part.scores.scale is None else part.scores.scale}
        found["scores"] = scores
    elif isinstance(part, Mla | Cross):
        whole = part.nope_dim + part.rope_dim if isinstance(part, Mla) else size
        found["scale"] = whole**-0.5 if part.scale is None else part.scale
    return found | placed(spec, part, size)


def placed(spec: ModelSpec, part: MixerSpec, size: int | None) -> Tree:
    """The scheme that a mixer names, in place of its name; null where it does nothing. size: of a head."""
    name = getattr(part, "position", None)
    if name is None:
        return {}
    acting = name in schemes(spec, "on_qk", "on_read", "bias")
    return {"position": scheme(spec.positions[name], spec.root(f"positions.{name}"), size) if acting else None}


def scheme(position: PositionSpec, site: Site, size: int | None = None) -> Tree:
    tree: Tree = settled(position)
    if tree.get("dim") is not None and tree["dim"] == size:
        tree["dim"] = None
    return tree | ({"max": position.limit(site)} if "max" in tree else {})


def schemes(spec: ModelSpec, *hooks: str) -> list[str]:
    """The names of the position schemes that do something at one of these hooks."""
    with torch.device("meta"):
        built = {name: type(s.build(spec.root(f"positions.{name}"))) for name, s in spec.positions.items()}
    return [n for n, made in built.items() if any(getattr(made, h) is not getattr(Position, h) for h in hooks)]


def settled(value: Any) -> Any:
    """A spec as data, without what acts in training alone."""
    if isinstance(value, Mapping):
        return {k: settled(v) for k, v in value.items() if k not in TRAINING}
    if isinstance(value, list):
        return [settled(v) for v in value]
    return settled(dump(value)) if hasattr(value, "model_dump_json") else value


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path; numbers compare by value."""
    return dict(leaves(tree, path))


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, tree
    else:
        for key, value in items:
            yield from leaves(value, f"{path}.{key}" if path else str(key))

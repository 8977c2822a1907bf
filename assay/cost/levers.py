"""The largest term of what a model keeps, and what would shrink it: each change is billed, not estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from assay.cost.bill import DTYPES, Bill, Question, Sheet
from assay.spec.load import dump
from assay.spec.model import ModelSpec

Tree = dict[str, Any]
WINDOW, LOCAL = 1024, 5


@dataclass(frozen=True)
class Lever:
    """One change and the bytes of the term that it saves."""

    change: str
    saves: int


@dataclass(frozen=True)
class Largest:
    """The larger of weights and state, of their sum; `part` names the largest group of the weights. levers: what would
    shrink it, the largest saving first. That a model keeps its quality is not said."""

    term: str
    bytes: int
    of: int
    part: str | None
    part_bytes: int | None
    levers: tuple[Lever, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def largest(sheet: Sheet, told: Bill) -> Largest:
    ask = Question(**told.question)
    total = told.weight_bytes + told.state_bytes
    if told.state_bytes >= told.weight_bytes:
        found = tuple(state_levers(sheet, ask, told.state_bytes))
        return Largest("state", told.state_bytes, total, None, None, by_saving(found))
    width = told.weight_bytes / told.params["total"]
    part = max(told.params_by, key=told.params_by.__getitem__)
    found = tuple(weight_levers(sheet, told.params["total"], width))
    return Largest("weights", told.weight_bytes, total, part, round(told.params_by[part] * width), by_saving(found))


def by_saving(levers: tuple[Lever, ...]) -> tuple[Lever, ...]:
    return tuple(sorted((x for x in levers if x.saves > 0), key=lambda x: -x.saves))


def state_levers(sheet: Sheet, ask: Question, now: int) -> Iterator[Lever]:
    """Fewer key heads, windows in five of six layers, and smaller entries."""
    for change, spec in (*fewer_heads(sheet.spec), *windows(sheet.spec, ask.context)):
        yield Lever(change, now - Sheet(spec).state_bytes(ask))
    if ask.kv_dtype in DTYPES:
        for smaller in ("int8", "int4"):
            change = f"state in {smaller} instead of {ask.kv_dtype}"
            yield Lever(change, now - sheet.state_bytes(replace(ask, kv_dtype=smaller)))


def weight_levers(sheet: Sheet, now: int, width: float) -> Iterator[Lever]:
    """A narrower feed-forward layer, half the experts, a tied head, half the bytes. now: parameters; width: bytes of
    each."""
    for change, spec in (*halved(sheet.spec, "width"), *halved(sheet.spec, "experts"), *tied(sheet.spec)):
        yield Lever(change, round(width * (now - sum(Sheet(spec).params_by().values()))))
    if width > 2:
        yield Lever("weights in bf16 instead of f32", round((width - 2) * now))


def mapped(node: Any, key: str, new: Callable[[Tree], Any]) -> tuple[Any, list[tuple[Any, Any]]]:
    """The tree with `key` replaced in every mapping that has it, and the pairs (old, new) that differ. `new` sees the
    whole mapping; None leaves it alone."""
    if isinstance(node, list):
        made = [mapped(item, key, new) for item in node]
        return [item for item, _ in made], [pair for _, pairs in made for pair in pairs]
    if not isinstance(node, Mapping):
        return node, []
    out: Tree = {}
    pairs: list[tuple[Any, Any]] = []
    for name, value in node.items():
        out[name], inner = mapped(value, key, new)
        pairs += inner
    if key in out and (value := new(out)) is not None and value != out[key]:
        pairs.append((out[key], value))
        out[key] = value
    return out, pairs


def changed(spec: ModelSpec, key: str, new: Callable[[Tree], Any]) -> Iterator[tuple[str, ModelSpec]]:
    """`key 16 -> 4`, and the model with it in every block; nothing where no block can have it."""
    tree = dump(spec)
    tree["blocks"], pairs = mapped(tree["blocks"], key, new)
    if made := accepted(tree) if pairs else None:
        said = ", ".join(dict.fromkeys(f"{old} -> {value}" for old, value in pairs))
        yield f"{key} {said}", made


def accepted(tree: Tree) -> ModelSpec | None:
    try:
        return ModelSpec.model_validate(tree)
    except ValueError:
        return None  # this model has a reason against the change: it is not offered


def fewer_heads(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """A quarter of the key heads, or the next smaller number that divides the heads."""

    def quarter(part: Tree) -> int | None:
        heads = part.get("heads")
        now = part["kv_heads"] if part["kv_heads"] is not None else heads
        if not isinstance(heads, int) or not isinstance(now, int):
            return None
        part["kv_heads"] = now  # null is `heads`: said in full, it can be compared
        return next(n for n in range(max(1, now // 4), 0, -1) if heads % n == 0)

    return changed(spec, "kv_heads", quarter)


def halved(spec: ModelSpec, key: str) -> Iterator[tuple[str, ModelSpec]]:
    return changed(spec, key, lambda part: part[key] // 2 if isinstance(part[key], int) and part[key] > 1 else None)


def tied(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    tree = dump(spec)
    if isinstance(tree["head"], dict) and tree["head"].get("tie") is False:
        tree["head"]["tie"] = True
        if made := accepted(tree):
            yield "a head tied to the table", made


def windows(spec: ModelSpec, context: int) -> Iterator[tuple[str, ModelSpec]]:
    """Five layers with a window to one without, as Gemma 3 has them, where all layers are of one kind that sees
    everything."""
    tree = dump(spec)
    if len(tree["blocks"]) > 1 or spec.layers <= LOCAL or context <= WINDOW:
        return
    ((name, block),) = tree["blocks"].items()
    local, pairs = mapped(block, "window", lambda sees: WINDOW if sees["window"] is None else None)
    tree |= {"blocks": {name: block, "local": local}, "pattern": ["local"] * LOCAL + [name]}
    if pairs and name != "local" and (made := accepted(tree)):
        yield f"a window of {WINDOW} in five of six layers", made

"""No field is silent: a changed value changes weights, outputs, gradients, taps, cost or state, or it raises."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic import BaseModel

from assay.conform.cases import MEMORY, Case, case
from assay.ops.step import View
from assay.spec import registry
from assay.spec.base import PartSpec
from assay.spec.load import dump, validate


def others(annotation: Any, value: Any) -> Iterator[Any]:
    """Values of this type other than the present one, as plain data."""
    origin = get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in get_args(annotation):
            if option is type(None):
                if value is not None:
                    yield None
            else:
                yield from others(option, value)
    elif origin is Literal:
        yield from (option for option in get_args(annotation) if option != value)
    elif annotation is bool:
        yield not value
    elif annotation is int:
        yield from ((value * 2, value + 1) if isinstance(value, int) and not isinstance(value, bool) else (2, 3))
    elif annotation is float:
        yield from ((value * 0.5 + 0.05, value + 0.3) if isinstance(value, float | int) else (0.7,))
    elif annotation is str:
        yield "another"
    elif isinstance(annotation, type) and issubclass(annotation, PartSpec):
        yield from (dump(spec) for kind in registry.table(annotation.slot).values() for spec in kind.tiny())
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from nested(annotation, value)
    elif origin is tuple:
        yield [v + 1 for v in value] if value else [3, 2]


def nested(cls: type[BaseModel], value: Any) -> Iterator[Any]:
    """Nested values with one of their own fields changed."""
    present = value if isinstance(value, BaseModel) else None
    if present is None:
        try:
            present = cls()
            yield dump(present)
        except ValueError:
            return
    for name, info in type(present).model_fields.items():
        for other in others(info.annotation, getattr(present, name)):
            if name != "kind":
                yield {**dump(present), name: other}


def law_fields(c: Case) -> None:
    """For every field some other value matters, and every value that is accepted and ignored is named."""
    tree = dump(c.spec)
    base = fingerprint(c)
    for name, info in type(c.spec).model_fields.items():
        if name == "kind":
            continue
        silent: list[Any] = []
        mattered = False
        for other in others(info.annotation, getattr(c.spec, name)):
            try:
                spec = validate(type(c.spec), {**tree, name: other}, name)
                if spec != c.spec:
                    quiet = same(fingerprint(case(spec, c.device)), base)
                    mattered |= not quiet
                    silent += [other] * quiet
            except (ValueError, KeyError, AttributeError, IndexError):
                mattered = True  # it raises: honest
        # A number may restate the default (kv_heads equal to heads); of named choices each must matter.
        named = get_origin(info.annotation) is Literal or info.annotation is bool
        assert not silent or (mattered and not named), f"`{name}`: {silent[0]!r} is accepted and changes nothing"


def fingerprint(c: Case) -> dict[str, Any]:
    """Everything a field may change."""
    x, step = c.noise((24, c.site.d_in), 1).requires_grad_(), c.step(2, 12)
    c.modules.train()
    step = step.with_(listen=frozenset(["*"]))
    taps: dict[str, Any] = {}
    torch.manual_seed(0)
    given: dict[str, Any] = {}
    y = c.run(x, step, taps=taps, given=given)
    values: dict[str, Any] = {f"tap {k}": v.detach() for k, v in taps.items()}
    handed = {k: v.dense("k") if isinstance(v, View) else v for k, v in given.items()}
    values |= {"y": y.detach()} | {f"given {k}": v.detach() for k, v in handed.items() if isinstance(v, torch.Tensor)}
    table = c.spec.weights(c.site)
    cost = c.spec.cost(c.site, 12, 3, MEMORY)
    values["facts"] = (table, c.spec.state(c.site), cost, extras(c))
    return values


def extras(c: Case) -> Any:
    """What a spec says through its other questions: a residual's effect on init, running statistics after a step."""
    gains = [getattr(c.spec, "gain", lambda *_: 1.0)(name, c.site) for name in ("v.weight", "q.weight")]
    return gains, [p.detach().sum().item() for p in c.part.parameters() if not p.requires_grad]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a.keys() != b.keys() or a["facts"] != b["facts"]:
        return False
    return all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a if k != "facts")

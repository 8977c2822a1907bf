"""The bill of a model: parameters, state bytes and FLOPs, added up from what its parts declare. Allocates nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from assay.model.lm import embed_site, head_site
from assay.spec.base import Cost, PartSpec, PositionSpec, Site, StateField, Weight
from assay.spec.model import ModelSpec

KvDtype = Literal["bf16", "f32", "int8", "int4"]
DTYPES = {"bf16": "bfloat16", "f32": "float32", "f16": "float16"}
# Quantised entries carry a scale and a zero of 2 bytes each for every vector of the last dimension.
BITS, OVERHEAD = {"int8": 8, "int4": 4}, 4


@dataclass(frozen=True)
class Question:
    """What is asked: `context` tokens in each of `batch` sequences, weights in `dtype`, state in `kv_dtype`, pages of
    `page` tokens, `memory` tokens of an encoder."""

    context: int
    batch: int = 1
    dtype: str = "bf16"
    kv_dtype: str = "bf16"
    page: int = 16
    memory: int = 0

    def __post_init__(self) -> None:
        for name, least in (("context", 1), ("batch", 1), ("page", 1), ("memory", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}; at least {least} is accepted")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r}; accepted: {', '.join(DTYPES)}")
        if self.kv_dtype not in (*DTYPES, *BITS):
            raise ValueError(f"kv_dtype: {self.kv_dtype!r}; accepted: {', '.join((*DTYPES, *BITS))}")


def layer_of(name: str) -> int | None:
    """`blocks.3.mixer` -> 3."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def placed(spec: ModelSpec) -> Iterator[tuple[Site, PartSpec, bool]]:
    """Every part at its true site, and whether its weights are its own (not another layer's by `like`)."""
    special = {"embed": embed_site(spec), "head": head_site(spec)}
    for site, part in spec.parts():
        layer = layer_of(site.name)
        yield special.get(site.name, site), part, layer is None or spec.sources[layer] == layer


def cost_of(part: PartSpec, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
    """Linears, own weights and declared cost of a part and its children, for `new` tokens after `seen`."""
    linear = sum(w.flops for w in part.weights(site).values()) * new
    total = Cost(linear, linear) + part.cost(site, new, seen, memory)
    for child, place in part.children(site).values():
        total += child.cost(place, new, seen, memory)
    return total


def field_bytes(field: StateField, entries: int, question: Question) -> int:
    """Bytes of that many entries in the asked dtype; a field with a dtype of its own keeps it."""
    shape = field.shape
    if field.dtype == "model" and field.per != "sequence" and question.kv_dtype in BITS:
        width = math.ceil(shape[-1] * BITS[question.kv_dtype] / 8) + OVERHEAD
        return entries * math.prod(shape[:-1]) * width
    kv = question.kv_dtype if question.kv_dtype in DTYPES else question.dtype
    one = StateField(field.name, "sequence", shape, field.dtype).bytes(1, DTYPES[kv])
    return entries * one


def params(weights: dict[str, Weight]) -> dict[str, int]:
    """total; active: less the routed experts a token does not use; embedding: the input table and an untied head."""
    embedding = sum(w.numel for n, w in weights.items() if n == "embed.weight" or w.role == "head")
    active = sum(round(w.numel * w.active) for w in weights.values())
    return {"total": sum(w.numel for w in weights.values()), "active": active, "embedding": embedding}


@dataclass(frozen=True)
class LayerBill:
    """One layer (or a part outside the layers): its parts by name and kind, and its share of everything."""

    name: str
    parts: dict[str, str]
    params: int
    active: int
    state_bytes_per_token: int
    state_bytes: int
    reserved_bytes: int
    prefill_flops: int
    decode_flops: int
    prefill_executed: int
    decode_executed: int


@dataclass(frozen=True)
class Bill:
    """See the command line's contract for the keys."""

    params: dict[str, int]
    weight_bytes: int
    state_bytes_per_token: int
    state_bytes: int
    reserved_bytes: int
    flops: dict[str, int]
    layers: tuple[LayerBill, ...]
    question: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bill(spec: ModelSpec, question: Question | None = None) -> Bill:
    """What the model needs at this question; every number is exact for the declared parts."""
    ask = question or Question(spec.context)
    _check_limits(spec, ask.context)
    groups: dict[str, list[tuple[Site, PartSpec, bool]]] = {}
    for site, part, owns in placed(spec):
        layer = layer_of(site.name)
        groups.setdefault(site.name if layer is None else f"blocks.{layer}", []).append((site, part, owns))
    layers = tuple(_layer(name, group, ask) for name, group in groups.items())
    total = {
        "total": sum(x.params for x in layers),
        "active": sum(x.active for x in layers),
        "embedding": _embedding(groups),
    }
    prefill = sum(x.prefill_flops for x in layers)
    encoder = bill(spec.encoder, Question(max(ask.memory, 1), 1, ask.dtype)) if spec.encoder else None
    extra = encoder.flops["prefill"] if encoder and ask.memory else 0
    extra_executed = encoder.flops["prefill_executed"] if encoder and ask.memory else 0
    flops = {
        "train_per_token": 3 * (prefill // ask.batch + extra) // ask.context,
        "prefill": prefill + ask.batch * extra,
        "decode_per_token": sum(x.decode_flops for x in layers),
        "prefill_executed": sum(x.prefill_executed for x in layers) + ask.batch * extra_executed,
        "decode_per_token_executed": sum(x.decode_executed for x in layers),
    }
    if encoder is not None:
        total = {key: total[key] + encoder.params[key] for key in total}
    return Bill(
        total,
        total["total"] * (4 if ask.dtype == "f32" else 2),
        sum(x.state_bytes_per_token for x in layers),
        sum(x.state_bytes for x in layers),
        sum(x.reserved_bytes for x in layers),
        flops,
        layers,
        asdict(ask),
    )


def _check_limits(spec: ModelSpec, context: int) -> None:
    for site, part in spec.parts():
        limit = part.limit(site) if isinstance(part, PositionSpec) else None
        if limit is not None and context > limit:
            raise ValueError(
                f"context: {context}; {site.name} ({part.kind_name()}) has {limit} positions: 1 to {limit} are accepted"
            )


def _embedding(groups: dict[str, list[tuple[Site, PartSpec, bool]]]) -> int:
    tables = {f"{s.name}.{k}": w for g in groups.values() for s, p, own in g if own for k, w in p.weights(s).items()}
    return params(tables)["embedding"]


def _layer(name: str, group: list[tuple[Site, PartSpec, bool]], ask: Question) -> LayerBill:
    weights = {f"{s.name}.{k}": w for s, p, own in group if own for k, w in p.weights(s).items()}
    fields = [f for s, p, _ in group for f in p.state(s)]
    growing = [f for f in fields if f.per == "token"]
    count = params(weights)
    stored = sum(field_bytes(f, f.entries(ask.context, ask.memory), ask) for f in fields)
    kept = sum(field_bytes(f, f.slots(ask.context, ask.page, ask.memory), ask) for f in fields)
    costs = {"all": Cost(), "one": Cost()}
    for site, part, _ in group:
        costs["all"] += cost_of(part, site, ask.context, 0, ask.memory)
        costs["one"] += cost_of(part, site, 1, ask.context - 1, ask.memory)
    kinds = {s.name.removeprefix(f"{name}."): p.kind_name() for s, p, _ in group if p.slot in ("mixers", "ffns")}
    return LayerBill(
        name,
        kinds or {s.name: p.kind_name() for s, p, _ in group},
        count["total"],
        count["active"],
        sum(field_bytes(f, 1, ask) // f.every for f in growing),
        ask.batch * stored,
        ask.batch * kept,
        ask.batch * costs["all"].flops,
        costs["one"].flops,
        ask.batch * costs["all"].executed,
        costs["one"].executed,
    )

"""The bill of a model: parameters, state bytes and FLOPs, added up from what its parts declare. Allocates nothing."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from assay.cost.packed import packed
from assay.model.lm import embed_site, head_site
from assay.ops.packed import packed_bytes
from assay.ops.sees import Sees
from assay.spec.base import DTYPE_BYTES, Cost, PartSpec, PositionSpec, Site, StateField, Weight
from assay.spec.model import ModelSpec

KvDtype = Literal["bf16", "f32", "int8", "int4"]
DTYPES = {"bf16": "bfloat16", "f32": "float32", "f16": "float16"}
# Quantised entries carry a scale and a zero of 2 bytes each for every vector of the last dimension.
BITS, OVERHEAD = {"int8": 8, "int4": 4}, 4
TABLE = 8  # bits of what stands over the vocabulary where weights are packed
MOST = 1 << 30  # tokens: no longer context is tried


@dataclass(frozen=True)
class Question:
    """What is asked: `context` tokens in each of `batch` sequences, weights in `dtype` (int8 and int4: as the engine
    packs them, and bf16 for all else), state in `kv_dtype`, pages of `page` tokens, `memory` tokens of an encoder."""

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
        if self.dtype not in (*DTYPES, *BITS):
            raise ValueError(f"dtype: {self.dtype!r}; accepted: {', '.join((*DTYPES, *BITS))}")
        if self.kv_dtype not in (*DTYPES, *BITS):
            raise ValueError(f"kv_dtype: {self.kv_dtype!r}; accepted: {', '.join((*DTYPES, *BITS))}")

    @property
    def floats(self) -> Question:
        """The same where no weight is packed: of training, of arithmetic, and of what stays float."""
        return self if self.dtype in DTYPES else replace(self, dtype="bf16")


def layer_of(name: str) -> int | None:
    """`blocks.3.mixer` -> 3."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


@dataclass(frozen=True)
class Placed:
    """A part at its true site with its weights. owns: they are its own, not another layer's by `like`. reads: the
    state fields that one decoded token reads, which for borrowed keys and values are the giver's. scheme: the position
    scheme that a mixer names, at its own site."""

    site: Site
    part: PartSpec
    owns: bool
    weights: dict[str, Weight]
    state: tuple[StateField, ...]
    reads: tuple[StateField, ...]
    scheme: tuple[Site, PositionSpec] | None = None

    @property
    def own_weights(self) -> dict[str, Weight]:
        return {f"{self.site.name}.{key}": w for key, w in self.weights.items()} if self.owns else {}

    def cost(self, new: int, seen: int, memory: int = 0) -> Cost:
        """Linears, own weights and declared cost of the part and its children, for `new` tokens after `seen`."""
        linear = sum(w.flops for w in self.weights.values()) * new
        total = Cost(linear, linear) + self.part.cost(self.site, new, seen, memory)
        for child, place in self.part.children(self.site).values():
            total += child.cost(place, new, seen, memory)
        return total + self._biases(new, seen)

    def _biases(self, new: int, seen: int) -> Cost:
        """Of the position scheme, in this layer."""
        if self.scheme is None:
            return Cost()
        (place, scheme), sees = self.scheme, getattr(self.part, "sees", Sees())
        kept = seen if sees.keep is None else min(seen, sees.keep)
        return scheme.told(place, getattr(self.part, "heads"), new, sees.pairs(new, seen), new * (new + kept))  # noqa: B009


def remembers(spec: ModelSpec) -> bool:
    """Whether anything is kept from one token to the next: a text goes on where a head names tokens and no layer sees
    what comes later, but for a prefix, which comes whole. An encoder reads a text at once and keeps nothing."""
    ahead = (p for _, p in spec.parts() if "chunking" in p.refusals())
    whole = all(getattr(getattr(p, "sees", None), "prefix", False) for p in ahead)
    return spec.head is not None and spec.head.names_tokens and whole


def placed(spec: ModelSpec) -> Iterator[Placed]:
    """Every part of a model (not of its encoder)."""
    special = {"embed": embed_site(spec), "head": head_site(spec)}
    given: dict[str, tuple[StateField, ...]] = {}
    keeps = remembers(spec)
    for found, part in spec.parts():
        site, layer = special.get(found.name, found), layer_of(found.name)
        state = part.state(site) if keeps else ()
        gives, takes = (getattr(part, key, None) for key in ("gives", "takes"))
        if isinstance(gives, str):
            given[gives] = state
        reads = given[takes] if isinstance(takes, str) else state
        owns = layer is None or spec.sources[layer] == layer
        named = getattr(part, "position", None)
        scheme = (spec.root(f"positions.{named}"), spec.positions[named]) if isinstance(named, str) else None
        yield Placed(site, part, owns, part.weights(site), state, reads, scheme)


def field_bytes(field: StateField, entries: int, question: Question) -> int:
    """Bytes of that many entries in the asked dtype; a field with a dtype of its own keeps it."""
    shape = field.shape
    if field.dtype == "model" and field.per != "sequence" and question.kv_dtype in BITS:
        width = math.ceil(shape[-1] * BITS[question.kv_dtype] / 8) + OVERHEAD
        return entries * math.prod(shape[:-1]) * width
    kv = question.kv_dtype if question.kv_dtype in DTYPES else question.floats.dtype
    one = StateField(field.name, "sequence", shape, field.dtype).bytes(1, DTYPES[kv])
    return entries * one


def stored(fields: Iterable[StateField], ask: Question) -> int:
    """Bytes of what can still be read, of the whole batch."""
    return ask.batch * sum(field_bytes(f, f.entries(ask.context, ask.memory), ask) for f in fields)


def reserved(fields: Iterable[StateField], ask: Question) -> int:
    """Bytes of the whole pages that hold it."""
    return ask.batch * sum(field_bytes(f, f.slots(ask.context, ask.page, ask.memory), ask) for f in fields)


def params(weights: dict[str, Weight]) -> dict[str, int]:
    """total; active: less the routed experts a token does not use; embedding: the input table and an untied head."""
    embedding = sum(w.numel for n, w in weights.items() if n == "embed.weight" or w.role == "head")
    active = sum(round(w.numel * w.active) for w in weights.values())
    return {"total": sum(w.numel for w in weights.values()), "active": active, "embedding": embedding}


def group_of(part: PartSpec, weight: Weight) -> str:
    """What a parameter is counted under in `params_by`."""
    if weight.role == "expert":
        return "experts"
    return part.slot if part.slot in ("embeds", "mixers", "ffns", "heads") else "other"


@dataclass(frozen=True)
class LayerBill:
    """One layer (or a part outside the layers): its block's name, its parts by name and kind, and its share of
    everything."""

    name: str
    block: str
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
    state_bytes_read: int


@dataclass(frozen=True)
class Bill:
    """See the command line's contract for the keys. params_by: parameters of mixers, ffns (routed experts apart),
    tables, heads and the rest. state_bytes_read: what one decode step of the batch reads at the full context."""

    params: dict[str, int]
    weight_bytes: int
    state_bytes_per_token: int
    state_bytes: int
    reserved_bytes: int
    flops: dict[str, int]
    layers: tuple[LayerBill, ...]
    question: dict[str, Any]
    params_by: dict[str, int]
    state_bytes_read: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bill(spec: ModelSpec, question: Question | None = None) -> Bill:
    """What the model needs at this question; every number is exact for the declared parts."""
    return Sheet(spec).bill(question or Question(spec.context))


class Sheet:
    """A model's parts, read once; `bill` answers any number of questions about them."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.parts, self.keeps = tuple(placed(spec)), remembers(spec)
        self.encoder = Sheet(spec.encoder) if spec.encoder is not None else None
        self.groups: dict[str, list[Placed]] = {}
        for one in self.parts:
            layer = layer_of(one.site.name)
            self.groups.setdefault(one.site.name if layer is None else f"blocks.{layer}", []).append(one)

    @property
    def limit(self) -> int | None:
        """The longest context that every position scheme has."""
        limits = [p.part.limit(p.site) for p in self.parts if isinstance(p.part, PositionSpec)]
        return min((n for n in limits if n is not None), default=None)

    def weights(self) -> dict[str, Weight]:
        return {name: w for p in self.parts for name, w in p.own_weights.items()}

    def held(self, ask: Question) -> dict[str, int]:
        """Bytes of each weight of the decoder."""
        width, bits = DTYPE_BYTES[DTYPES[ask.floats.dtype]], BITS.get(ask.dtype)
        found = {name: w.numel * width for name, w in self.weights().items()}
        if bits is None:
            return found
        for one in (one for one in self.parts if one.owns):
            of = TABLE if one.part.slot in ("embeds", "heads") else bits
            for name in packed(one.part, one.site):
                *experts, out, size = one.weights[name].shape
                found[f"{one.site.name}.{name}"] = math.prod(experts) * packed_bytes(out, size, of)
        return found

    def bill(self, ask: Question) -> Bill:
        self._check_limits(ask.context)
        layers = tuple(self._layer(name, ask) for name in self.groups)
        first = self.encoder.bill(Question(max(ask.memory, 1), 1, ask.dtype)) if self.encoder is not None else None
        total = params(self.weights())
        if first is not None:
            total = {key: total[key] + first.params[key] for key in total}
        return Bill(
            total,
            sum(self.held(ask).values()) + (first.weight_bytes if first is not None else 0),
            sum(x.state_bytes_per_token for x in layers),
            sum(x.state_bytes for x in layers),
            sum(x.reserved_bytes for x in layers),
            _flops(layers, ask, first.flops if first is not None and ask.memory else None),
            layers,
            asdict(ask),
            self.params_by(),
            sum(x.state_bytes_read for x in layers),
        )

    def state_bytes(self, ask: Question) -> int:
        return stored([f for p in self.parts for f in p.state], ask)

    def reserved_bytes(self, ask: Question) -> int:
        return reserved([f for p in self.parts for f in p.state], ask)

    def state_bytes_read(self, ask: Question) -> int:
        return stored([f for p in self.parts for f in p.reads], ask)

    def decode_flops(self, ask: Question) -> int:
        """Of one token that sees the whole context: cheap, where `bill` also counts the prefill's pairs."""
        return self._one(self.parts, ask).flops

    def _one(self, parts: Iterable[Placed], ask: Question) -> Cost:
        """One more token; nothing where none can come."""
        return sum((p.cost(1, ask.context - 1, ask.memory) for p in parts if self.keeps), Cost())

    def params_by(self) -> dict[str, int]:
        found = dict.fromkeys(("embeds", "mixers", "ffns", "experts", "heads", "other"), 0)
        for one in self.parts:
            for weight in one.weights.values() if one.owns else ():
                found[group_of(one.part, weight)] += weight.numel
        if self.encoder is not None:
            found = {key: count + self.encoder.params_by()[key] for key, count in found.items()}
        return found

    def _check_limits(self, context: int) -> None:
        for one in self.parts:
            limit = one.part.limit(one.site) if isinstance(one.part, PositionSpec) else None
            if limit is not None and context > limit:
                raise ValueError(
                    f"context: {context}; {one.site.name} ({one.part.kind_name()}) has {limit} positions: "
                    f"1 to {limit} are accepted"
                )

    def _layer(self, name: str, ask: Question) -> LayerBill:
        group, layer = self.groups[name], layer_of(name)
        fields = [f for p in group for f in p.state]
        read = [f for p in group for f in p.reads]
        count = params({key: w for p in group for key, w in p.own_weights.items()})
        whole = sum((p.cost(ask.context, 0, ask.memory) for p in group), Cost())
        one = self._one(group, ask)
        kinds = {p.site.name.removeprefix(f"{name}."): p.part for p in group}
        shown = {n: p.kind_name() for n, p in kinds.items() if p.slot in ("mixers", "ffns")}
        return LayerBill(
            name,
            "" if layer is None else self.spec.plan[layer],
            shown or {n: p.kind_name() for n, p in kinds.items()},
            count["total"],
            count["active"],
            sum(field_bytes(f, 1, ask) // f.every for f in fields if f.per == "token"),
            stored(fields, ask),
            reserved(fields, ask),
            ask.batch * whole.flops,
            one.flops,
            ask.batch * whole.executed,
            one.executed,
            stored(read, ask),
        )


def crossover(one: Sheet, other: Sheet, ask: Question) -> int | None:
    """The least context from which on the state of `one` stays below that of `other`, up to the positions that both
    have; null: it does not stay below. Between two windows' ends both grow by a constant a token."""
    limit = min(n for n in (one.limit, other.limit, MOST) if n is not None)
    windows = {f.keep for sheet in (one, other) for p in sheet.parts for f in p.state if f.keep is not None}
    ends = sorted({1, limit, *(keep for keep in windows if keep < limit)})

    def below(context: int) -> bool:
        at = replace(ask, context=context)
        return one.state_bytes(at) < other.state_bytes(at)

    if not below(limit):
        return None
    for low, high in reversed(list(pairwise(ends))):
        if not below(low):
            return low + bisect_left(range(low, high), True, key=below)
    return 1


def _flops(layers: tuple[LayerBill, ...], ask: Question, encoder: dict[str, int] | None) -> dict[str, int]:
    """encoder: the FLOPs of one encoded memory, where there is one."""
    prefill = sum(x.prefill_flops for x in layers)
    extra = encoder["prefill"] if encoder is not None else 0
    extra_executed = encoder["prefill_executed"] if encoder is not None else 0
    return {
        "train_per_token": 3 * (prefill // ask.batch + extra) // ask.context,
        "prefill": prefill + ask.batch * extra,
        "decode_per_token": sum(x.decode_flops for x in layers),
        "prefill_executed": sum(x.prefill_executed for x in layers) + ask.batch * extra_executed,
        "decode_per_token_executed": sum(x.decode_executed for x in layers),
    }

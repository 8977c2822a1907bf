"""What a training step on many processes keeps on each of them and what each sends: told before the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from assay.cost.bill import DTYPES, Question, Sheet, layer_of
from assay.cost.memory import kept_by_part
from assay.spec.base import DTYPE_BYTES, Weight
from assay.spec.model import ModelSpec
from assay.spec.shard import TABLE, Cut, Deal, deal, spans, stage_of, tied

ROWS = ("data", "shard", "expert")
FLOAT = 4
"""Bytes of a number in what is trained: weights, gradients and moments are float32."""
UNDER_WAY = 2
"""Messages from one stage of a pipeline to another that may be on their way; what was sent is kept until then."""


@dataclass(frozen=True)
class Spread:
    """How many processes along each axis, and in how many pieces a step is taken. offload: what `shard` cuts stands on
    the host."""

    sizes: Mapping[str, int]
    pieces: int = 1
    offload: bool = False

    def size(self, *axes: str) -> int:
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    @property
    def processes(self) -> int:
        return self.size(*self.sizes)


@dataclass(frozen=True)
class Share:
    """Bytes of the process that has most. weights, gradients, moments: what it holds in float32 between and after
    backward passes, and for bf16 and f16 copies of the first two.
    gathered: whole weights that `shard` makes for a while: those outside the blocks, the largest block, and the one
    that is fetched meanwhile. activations: of its rows of one piece, as if no part were cut inside. host: how much of
    all this stands on the host.

    sent: bytes a step that it sends to others, by kind, as the ring algorithms do: gradients and gathered weights,
    what crosses parts that are cut along `tensor`, `context` and `expert` (of an even choice of experts), and the
    stream between stages of a pipeline.
    layers: of a stage, the first and the one behind the last. held: pieces whose activations it keeps at once (1F1B).
    bubble: the part of a step's time that stages of equal work wait. stages: one share each, in their order; of a
    model that is not cut into stages there are none.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int
    activations: int
    sent: Mapping[str, int]
    host: int = 0
    layers: tuple[int, int] = (0, 0)
    held: int = 1
    bubble: float = 0.0
    stages: tuple[Share, ...] = ()

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.gathered + self.activations

    @property
    def device(self) -> int:
        """What a device has of it; without offload all."""
        return self.total - self.host

    def as_json(self) -> dict[str, object]:
        stages = [one._told | {"layers": list(one.layers), "held": one.held} for one in self.stages]
        return self._told | {"pipeline": {"bubble": self.bubble, "stages": stages} if stages else None}

    @property
    def _told(self) -> dict[str, object]:
        names = ("weights", "gradients", "moments", "gathered", "activations", "total", "device", "host")
        return {name: getattr(self, name) for name in names} | {"sent": dict(self.sent)}


def share(sheet: Sheet, ask: Question, how: Spread) -> Share:
    """A step on `ask.batch` rows of `ask.context` tokens. ValueError, by name, for a model that cannot be spread so."""
    stages, ask = how.size("pipeline"), ask.floats
    saved = saved_by_part(sheet, ask, how)
    found = [stage_share(sheet, ask, how, stage, saved) for stage in range(stages)]
    most = max(found, key=lambda one: one.device)
    return replace(most, bubble=bubble(stages, how.pieces), stages=tuple(found)) if stages > 1 else most


def stage_share(sheet: Sheet, ask: Question, how: Spread, stage: int, saved: Mapping[str, int]) -> Share:
    """Of the stage's layers, and of what stands before the first and behind the last of a model. saved: by part, for
    backward."""
    found, spec, stages = deal(sheet.spec, how.sizes), sheet.spec, how.size("pipeline")
    layers = spans(spec.layers, stages)[stage]
    whole = on_stage(all_weights(sheet), spec, stage, stages)
    table = {name: found.local(name, w, how.sizes) for name, w in whole.items()}
    units = list(gathered_units(sheet, table))
    own = sum(w.numel for w in held(whole, found, how).values()) * FLOAT
    # Pieces before the last are added up where they are made, whole: with offload on the device, beside what is kept on
    # the host.
    summed = how.pieces > 1 and how.size("shard") > 1
    gradients = sum(w.numel for w in table.values()) * FLOAT + own * how.offload if summed else own
    copies = DTYPE_BYTES[DTYPES[ask.dtype]] * sum(w.numel for w in table.values())
    copies = 0 if ask.dtype == "f32" or how.size("shard") > 1 else copies
    return Share(
        own + copies,
        gradients + copies,
        2 * own,
        peak(units, how, DTYPE_BYTES[DTYPES[ask.dtype]]),
        kept(sheet, ask, how, stage, saved),
        sent(sheet, ask, how, found, table, stage),
        4 * own if how.offload else 0,
        (layers.start, layers.stop),
        in_flight(stage, stages, how.pieces),
    )


def all_weights(sheet: Sheet) -> dict[str, Weight]:
    """The encoder's too."""
    inner = sheet.encoder.weights() if sheet.encoder is not None else {}
    return sheet.weights() | {f"encoder.{name}": w for name, w in inner.items()}


def on_stage(table: Mapping[str, Weight], spec: ModelSpec, stage: int, stages: int) -> dict[str, Weight]:
    """The weights that a stage of a pipeline has."""
    both = {TABLE} if tied(spec) and stage == stages - 1 else set()
    return {name: w for name, w in table.items() if name in both or stage_of(name, spec, stages) == stage}


def in_flight(stage: int, stages: int, pieces: int) -> int:
    """The most pieces whose activations a stage keeps at once: as many as there are stages from it on (1F1B; Narayanan
    et al. 2021, arXiv 2104.04473, section 2.2.1)."""
    return min(stages - stage, pieces)


def bubble(stages: int, pieces: int) -> float:
    """The part of a step's time in which a stage waits, where all stages take equally long (Huang et al. 2018, arXiv
    1811.06965, section 2.3)."""
    return (stages - 1) / (pieces + stages - 1)


def held(table: Mapping[str, Weight], found: Deal, how: Spread) -> dict[str, Weight]:
    """What the process that has most holds of each of these weights."""
    local = {name: found.local(name, w, how.sizes) for name, w in table.items()}
    shards = how.size("shard")
    return {name: replace(w, shape=(-(-w.shape[0] // shards), *w.shape[1:])) for name, w in local.items()}


def most_rows(ask: Question, how: Spread) -> int:
    """Of a piece, on the process that has most of them."""
    return -(-(ask.batch // how.pieces) // how.size(*ROWS))


def saved_by_part(sheet: Sheet, ask: Question, how: Spread) -> dict[str, int]:
    """Bytes that those rows keep for backward in each part, with all their columns."""
    rows = most_rows(ask, how)
    found = kept_by_part(sheet, rows, ask.context, ask.dtype)
    if sheet.encoder is not None:
        inner = kept_by_part(sheet.encoder, rows, ask.memory, ask.dtype)
        found |= {f"encoder.{name}": count for name, count in inner.items()}
    return found


def kept(sheet: Sheet, ask: Question, how: Spread, stage: int, saved: Mapping[str, int]) -> int:
    """Bytes that the process with most rows of a piece has for backward, of all pieces that are under way."""
    stages = how.size("pipeline")
    stream = most_rows(ask, how) * ask.context * stream_values(sheet.spec) * DTYPE_BYTES[DTYPES[ask.dtype]]
    own = sum(count for name, count in saved.items() if stage_of(name, sheet.spec, stages) == stage)
    held = in_flight(stage, stages, how.pieces) * own + streams_kept(stage, stages, how.pieces) * stream
    return held // how.size("context")


def streams_kept(stage: int, stages: int, pieces: int) -> int:
    """How many pieces' streams a stage keeps beside what is saved for backward: those that it sent on and awaits the
    gradients of, and gradients that it sent back a while ago."""
    held = in_flight(stage, stages, pieces)
    return held * (stage < stages - 1) + (min(UNDER_WAY, pieces - held) if stage else 0)


def stream_values(spec: ModelSpec) -> int:
    """Values of the residual stream a token, as the residuals carry it."""
    with torch.device("meta"):
        first = spec.expand()[0][0].residual.build(spec.site(0).child("residual0"))
        return int(first.open(torch.empty(1, spec.d_model)).numel())


def rows_of(weight: Weight, shards: int) -> int:
    """Values of a weight on the process that has most of it: the first dimension is cut, rounded up."""
    return -(-weight.shape[0] // shards) * math.prod(weight.shape[1:])


def gathered_units(sheet: Sheet, table: Mapping[str, Weight]) -> Iterator[tuple[str, list[Weight]]]:
    """What `shard` gathers at once: each block that one layer has alone, and "" for all the rest."""
    rest: list[Weight] = []
    blocks: dict[str, list[Weight]] = {}
    for name, weight in table.items():
        layer = layer_of(name)
        if layer is None or sheet.spec.sources.count(layer) > 1:
            rest.append(weight)
        else:
            blocks.setdefault(f"blocks.{layer}", []).append(weight)
    yield "", rest
    yield from blocks.items()


def padded(weights: list[Weight], shards: int) -> int:
    """Values in the buffer that a unit is gathered into: every process sends as much."""
    return sum(rows_of(w, shards) for w in weights) * shards


def peak(units: list[tuple[str, list[Weight]]], how: Spread, width: int) -> int:
    if (shards := how.size("shard")) == 1:
        return 0
    blocks = sorted((padded(weights, shards) for name, weights in units if name), reverse=True)
    return width * (sum(padded(weights, shards) for name, weights in units if not name) + sum(blocks[:2]))


def sent(
    sheet: Sheet, ask: Question, how: Spread, found: Deal, table: Mapping[str, Weight], stage: int
) -> dict[str, int]:
    """Bytes a step by kind, of a stage. table: its weights, as they are cut."""
    width, shards, stages = DTYPE_BYTES[DTYPES[ask.dtype]], how.size("shard"), how.size("pipeline")
    rows = -(-ask.batch // how.size(*ROWS))
    tokens = rows * ask.context // how.size("context")
    total = {"all_reduce": 0.0, "all_gather": 0.0, "reduce_scatter": 0.0}
    for name, weight in table.items():
        cut = found.cuts.get(name)
        for n in (summed_over(cut, name in found.partial, how), 1 if cut is None else cut.copies):
            total["all_reduce"] += 2 * (n - 1) / n * rows_of(weight, shards) * FLOAT
    if shards > 1:
        for name, weights in gathered_units(sheet, table):
            size = (shards - 1) / shards * padded(weights, shards)
            # A block is gathered forward and backward, the rest once for both.
            total["all_gather"] += (2 if name else 1) * how.pieces * size * width
            total["reduce_scatter"] += size * FLOAT
    if (n := how.size("tensor")) > 1:
        crossed = sum(
            p.part.slot in ("mixers", "ffns") and bool(p.part.pieces(p.site).get("tensor"))
            for p in sheet.parts
            if stage_of(p.site.name, sheet.spec, stages) == stage
        )
        # One sum forward and one backward for each part, one forward for the table that is cut by rows, and one
        # backward for the head, whose input is whole.
        ends = (stage == 0) + (stage == stages - 1)
        total["all_reduce"] += 2 * (n - 1) / n * tokens * sheet.spec.d_model * width * (2 * crossed + ends)
    for kind, size in crossing(sheet, how, stage, (rows, tokens), width):
        total[kind] = total.get(kind, 0.0) + size
    if stages > 1:
        borders = (stage > 0) + (stage < stages - 1)
        total["send"] = total.get("send", 0.0) + borders * tokens * stream_values(sheet.spec) * width
        if tied(sheet.spec) and stage in (0, stages - 1):
            total["send"] += table[TABLE].numel * FLOAT
    return {kind: round(size) for kind, size in total.items()}


def crossing(sheet: Sheet, how: Spread, stage: int, own: tuple[int, int], width: int) -> Iterator[tuple[str, float]]:
    """Kinds and bytes of what a stage's parts send along `context` and `expert`. own: rows and tokens of a process.

    context: what tokens leave behind is gathered from all ranks, and its gradients are summed back; a recurrence's
    state goes on to the next rank, and its gradient comes back, so that a rank with neighbours on both sides sends it
    twice. It is passed in the widest dtype of a part's fields. expert: rows go to the experts that they chose and
    back, and the same backward. Which leave is the router's to say: an even choice sends (n-1)/n of them.
    """
    (rows, tokens), ranks, experts = own, how.size("context"), how.size("expert")
    for p in sheet.parts:
        if stage_of(p.site.name, sheet.spec, how.size("pipeline")) != stage:
            continue
        if ranks > 1:
            left = sum(math.prod(f.shape) / f.every for f in p.state if f.per == "token")
            yield from ((kind, (ranks - 1) * tokens * left * width) for kind in ("all_gather", "reduce_scatter"))
            if kept := [f for f in p.state if f.per == "sequence"]:
                wide = max([width, *(DTYPE_BYTES[f.dtype] for f in kept if f.dtype != "model")])
                yield "send", min(2, ranks - 1) * rows * sum(math.prod(f.shape) for f in kept) * wide
        if experts > 1 and p.part.slot == "ffns" and p.part.pieces(p.site).get("expert"):
            up = p.weights["up"]  # of all experts, [E, width, what a row brings]
            chosen = round(up.active * up.shape[0])
            yield "all_to_all", 4 * (experts - 1) / experts * tokens * chosen * up.shape[-1] * width


def summed_over(cut: Cut | None, partial: bool, how: Spread) -> int:
    """How many processes sum their gradients of a weight, beside those that `shard` sums for and copies of a piece."""
    axes = [axis for axis in ("data", "context", "expert") if cut is None or axis != cut.axis]
    return how.size(*axes, *(["tensor"] if partial else []))

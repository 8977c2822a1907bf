"""The one model: decoder, encoder, or both, as the spec says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from assay.model.block import Block
from assay.model.init import initialise
from assay.ops.here import heard
from assay.ops.state import State, Stateless
from assay.ops.step import Memory, Step
from assay.parts.base import Part, Position
from assay.parts.heads.lm import LossOptions
from assay.spec.base import Site, StateField, Weight
from assay.spec.model import ModelSpec


@dataclass(frozen=True)
class Output:
    """`logits` [E, V] (of `step.emit`, else of every token) or, with targets, `loss` sums; `taps` by dotted name."""

    logits: Tensor | None
    loss: dict[str, Tensor] | None
    taps: dict[str, Tensor]


class Blank(Protocol):
    """Makes the states of a step that remembers nothing; `like`: their dtype and device. A plan for several processes
    puts one of its own in the place of `Forgetting`."""

    def __call__(self, step: Step, like: Tensor) -> Mapping[str, State]: ...


class Forgetting:
    """Each part's state in training."""

    def __init__(self, fields: Mapping[str, tuple[StateField, ...]]) -> None:
        self.fields = fields

    def __call__(self, step: Step, like: Tensor) -> dict[str, State]:
        return {name: Stateless(f, like.dtype, like.device) for name, f in self.fields.items()}


class Border(Protocol):
    """Where a model's blocks are spread over a pipeline of processes: what stands before this one's `span` of them and
    behind it. leaves: the stream goes on to another process; what is returned then stands for the loss."""

    leaves: bool

    def enter(self, step: Step, own: Entry) -> tuple[Tensor, dict[str, object]]: ...

    def leave(self, h: Tensor) -> dict[str, Tensor]: ...


Entry = Callable[[Step], tuple[Tensor, dict[str, object]]]
"""The residual stream before the first block, and what blocks are given."""


class LM(nn.Module):
    """Built from a spec; `forward` is the only entry."""

    def __init__(self, spec: ModelSpec, prefix: str = "") -> None:
        super().__init__()
        self.spec, self.prefix = spec, prefix
        taken = next((n for n in spec.positions if hasattr(nn.ModuleDict, n)), None)
        if taken is not None:
            raise ValueError(f"positions: the name {taken!r} is one that torch's modules use; accepted: another name")
        self.positions = nn.ModuleDict({n: p.build(self._site(f"positions.{n}")) for n, p in spec.positions.items()})
        self.embed = spec.embed.build(embed_site(spec, prefix))
        blocks: list[Block] = []
        stages = spec.expand()
        for layer, source in enumerate(spec.sources):
            blocks.append(blocks[source] if source != layer else Block(stages[layer], self._layer_site(layer)))
        self.blocks: Sequence[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.final_norm = spec.final_norm.build(self._site("final_norm")) if spec.final_norm is not None else None
        self.head = spec.head.build(head_site(spec, prefix)) if spec.head is not None else None
        self.encoder = LM(spec.encoder, f"{prefix}encoder.") if spec.encoder is not None else None
        if self.encoder is not None:
            self.encoder.embed.share(self.embed)
        schemes: dict[str, Position] = dict(self.positions.items())  # type: ignore[arg-type]
        parts = [m for block in blocks for m in block.modules() if isinstance(m, Part)]
        for part in parts:
            part.bind(schemes)
        # Keys are compared here, once: specs hash in Python, which neither a traced nor a quick step should do.
        keys: dict[object, int] = {}
        planned = [m for m in [*schemes.values(), *parts] if m.prepare_key() is not None]
        self._planned = [(m, keys.setdefault(m.prepare_key(), len(keys))) for m in planned]
        apart = tuple(f"{m.name}." for m in parts if m.by_piece)
        self._flat = [(m, number) for m, number in self._planned if not f"{m.name}.".startswith(apart)]
        self.blank: Blank = Forgetting(state_table(spec, prefix))
        self.span, self.border = range(spec.layers), cast(Border | None, None)

    def _site(self, name: str) -> Site:
        return prefixed(self.spec.root(name), self.prefix)

    def _layer_site(self, layer: int) -> Site:
        return prefixed(self.spec.site(layer), self.prefix)

    def forward(
        self,
        step: Step,
        states: Mapping[str, State] | None = None,
        targets: Int[Tensor, "N"] | None = None,
        options: LossOptions | None = None,
    ) -> Output:
        """One step through the stack. Without `states` nothing is remembered (training). The pieces of a step bring
        their own."""
        taps: dict[str, Tensor] = {}
        if step.pieces:
            states = {}
            pieces = tuple(replace(p, step=self.prepared(p.step, p.states, taps)) for p in step.pieces)
            step = step.with_(pieces=pieces, tables=self._tables(step, states, self._flat))
        else:
            states = states if states is not None else self._stateless(step)
            step = self.prepared(step, states, taps)
        return self.stacked(step, states, taps, targets, options)

    def stacked(
        self,
        step: Step,
        states: Mapping[str, State],
        taps: dict[str, Tensor],
        targets: Int[Tensor, "N"] | None = None,
        options: LossOptions | None = None,
    ) -> Output:
        """The layers on a step that is prepared: nothing here looks at the contents of a tensor."""
        h, given = self._entered(step) if self.border is None else self.border.enter(step, self._entered)
        for layer, block in enumerate(self.blocks):
            if layer in self.span:
                h, given, new = block(h, given, step, states, f"{self.prefix}blocks.{layer}")
                taps.update(new)
        if self.border is not None and self.border.leaves:
            return Output(None, self.border.leave(h), taps)
        h = self.blocks[self.span[0]].close(h)
        h = self.final_norm(h, step) if self.final_norm is not None else h
        if step.listen and heard(f"{self.prefix}final", step.listen):
            taps[f"{self.prefix}final"] = h
        if self.head is None:
            return Output(h, None, taps)
        if targets is not None:
            return Output(None, self.head.loss(h, targets, step, self.embed.table(), options), taps)
        h = h if step.emit is None else h.index_select(0, step.emit)
        return Output(self.head(h, step, self.embed.table()), None, taps)

    def _entered(self, step: Step) -> tuple[Tensor, dict[str, object]]:
        """The residual stream before the first block, and what blocks are given."""
        x = self.embed(step)
        for name in self.spec.positions:
            x = cast(Position, self.positions[name]).on_embed(x, step)
        return self.blocks[0].open(x), {"embed": x}

    def prepared(self, step: Step, states: Mapping[str, State], taps: dict[str, Tensor]) -> Step:
        """The step with its memory, and with the tables of all parts."""
        step = self._encoded(step, taps)
        return step.with_(tables=self._tables(step, states))

    def _encoded(self, step: Step, taps: dict[str, Tensor]) -> Step:
        """Run the encoder over `step.encode` and hand its features on as the memory."""
        if self.encoder is None or step.encode is None:
            return step
        out = self.encoder(step.encode)
        taps.update(out.taps)
        source = step.encode
        return step.with_(encode=None, memory=Memory(out.logits, source.seq, source.index, source.grid))

    def _stateless(self, step: Step) -> Mapping[str, State]:
        return self.blank(step, next(self.parameters()))

    def _tables(
        self, step: Step, states: Mapping[str, State], planned: Sequence[tuple[Part, int]] | None = None
    ) -> dict[str, object]:
        """`prepare`, once for each distinct key; parts that share a key and a layout share the result."""
        made: dict[tuple[int, object], object] = {}
        tables: dict[str, object] = {}
        for part, number in self._planned if planned is None else planned:
            state = states.get(part.name)
            key = (number, getattr(state, "layout_key", None))
            if key not in made:
                made[key] = part.prepare(step, state)
            tables[part.name] = made[key]
        return tables


def prefixed(site: Site, prefix: str) -> Site:
    """The same site under the name of a model inside another (`encoder.`)."""
    return replace(site, name=prefix + site.name)


def embed_site(spec: ModelSpec, prefix: str = "") -> Site:
    site = prefixed(spec.root("embed"), prefix)
    return Site(site.name, 0, spec.layers, spec.vocab, spec.d_model, (), spec.context, spec.init)


def head_site(spec: ModelSpec, prefix: str = "") -> Site:
    site = prefixed(spec.root("head"), prefix)
    return Site(site.name, 0, spec.layers, spec.d_model, spec.vocab, (), spec.context, spec.init)


def weight_table(spec: ModelSpec, prefix: str = "") -> dict[str, Weight]:
    """Every declared parameter of the model by its dotted name, once for shared blocks."""
    table: dict[str, Weight] = {}
    for site, part in spec.parts():
        if site.name.startswith("blocks.") and spec.sources[site.layer] != site.layer:
            continue
        place = {"embed": embed_site(spec), "head": head_site(spec)}.get(site.name, site)
        table |= {f"{place.name}.{k}": w for k, w in part.weights(place).items()}
    for layer in range(spec.layers):
        for site, stage, branch in spec.branches(layer) if spec.sources[layer] == layer else ():
            for key in branch.part.weights(site):
                table[f"{site.name}.{key}"] = scaled(table[f"{site.name}.{key}"], stage.residual.gain(key, site))
    table = {prefix + name: weight for name, weight in table.items()}
    if spec.encoder is not None:
        table |= weight_table(spec.encoder, f"{prefix}encoder.")
    return table


def scaled(weight: Weight, gain: float) -> Weight:
    """The weight with its initial spread times `gain`."""
    return weight if gain == 1.0 else replace(weight, init=replace(weight.init, std=weight.init.std * gain))


def state_table(spec: ModelSpec, prefix: str = "") -> dict[str, tuple[StateField, ...]]:
    """The declared state of every mixer, of a convolution before it, and of every ffn by its dotted name (the
    decoder's: an encoder remembers nothing)."""
    table: dict[str, tuple[StateField, ...]] = {}
    for layer in range(spec.layers):
        for site, part in spec.layer_parts(layer):
            if part.slot in ("mixers", "ffns"):
                table[prefix + site.name] = part.state(site)
    return table


def build(spec: ModelSpec, seed: int = 0, device: torch.device | str = "cpu") -> LM:
    """A new model with the weights that `seed` draws."""
    model = LM(spec)
    initialise_all(model, spec, seed)
    return model.to(device)


def initialise_all(model: LM, spec: ModelSpec, seed: int) -> None:
    initialise(model, weight_table(spec), seed)

"""One place of a model at a time, given what the reference gives it, so that a difference shows where it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.hub.load import put
from assay.model.block import Block
from assay.model.lm import LM
from assay.ops.step import Memory, Step
from assay.spec.model import ModelSpec


@dataclass(frozen=True)
class Place:
    """A stretch of the model between two values that the reference has. layer: of a block, else null."""

    name: str
    layer: int | None
    given: str | None
    wanted: str


def places(spec: ModelSpec) -> tuple[Place, ...]:
    """The embedding, every block, the final norm and the head, in order."""
    last = spec.layers
    blocks = [Place(f"blocks.{i}", i, f"hidden.{i}", f"hidden.{i + 1}") for i in range(last)]
    ends = [Place("embed", None, None, "hidden.0"), *blocks]
    if spec.final_norm is not None:
        ends.append(Place("final_norm", None, f"hidden.{last}", "final"))
    if spec.head is not None:
        ends.append(Place("head", None, "final" if spec.final_norm is not None else f"hidden.{last}", "logits"))
    return tuple(ends)


@dataclass(frozen=True)
class Side:
    """A stack as a model of its own, with what it runs on and what it should give. named: what the reference's names
    of it begin with."""

    named: str
    model: LM
    step: Step
    reference: Mapping[str, Tensor]


def sides(model: LM, step: Step, reference: Mapping[str, Tensor]) -> Iterator[Side]:
    """The encoder of an encoder-decoder, then the decoder, which reads the reference's memory where there is one."""
    source = step.encode
    if model.encoder is not None and source is not None:
        named = {name.removeprefix("enc."): x for name, x in reference.items() if name.startswith("enc.")}
        yield Side("enc.", rebuilt(model.encoder, model.encoder.spec, model), source, named)
        if (made := reference.get("enc.final")) is not None:
            memory = Memory(made.flatten(0, 1), source.seq, source.index, source.grid)
            step = step.with_(encode=None, memory=memory)
    yield Side("", model, step, reference)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|; infinite where shapes differ or a value is not finite."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not theirs.numel():
        return 0.0
    worst, largest = (ours.double() - theirs).abs().max(), theirs.abs().max().double()
    found = float(worst / largest.clamp(min=torch.finfo(torch.float32).tiny))
    return found if found == found else float("inf")


@dataclass
class Alone:
    """What each place makes of the reference's values: its output by its name, and taps and modules inside blocks."""

    outputs: dict[str, Tensor]
    inside: dict[str, Tensor]


@torch.no_grad()
def alone(model: LM, step: Step, reference: Mapping[str, Tensor], layer: int | None = None) -> Alone:
    """Run the model with every block, the final norm and the head fed from the reference.

    layer: also record what happens inside this block (see `assay.hub.live.Live.inside` for the names).
    """
    prefix = f"blocks.{layer}."
    # The attention's shares are squares that must be asked for by name.
    listen = frozenset() if layer is None else frozenset({f"{prefix}*", f"{prefix}*.probs"})
    found = Alone({}, {})
    with fed(model, reference, found), recorded(model, layer, found):
        out = model(step.with_(listen=listen))
    found.outputs["head"] = out.logits
    for name, value in out.taps.items():
        inner = name.removeprefix(prefix)
        found.inside[f"{inner.removesuffix('probs')}scores" if inner.endswith(".probs") else inner] = value
    return found


@contextmanager
def fed(model: LM, reference: Mapping[str, Tensor], found: Alone) -> Iterator[None]:
    """Blocks, final norm and head take the reference's inputs where there are such, and their outputs are noted."""
    inputs = {p.name: p.given for p in places(model.spec) if p.given is not None}

    def replaced(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        value = reference.get(inputs.get(name, ""))
        return args if value is None else (value.flatten(0, 1).to(args[0].dtype), *args[1:])

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        name = args[4]  # of the layer: blocks tied by `like` are one module
        if name == "blocks.0":
            found.outputs["embed"] = args[0]
        return replaced(name, args)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.outputs[args[4]] = output[0]

    def end(name: str) -> Any:
        return lambda module, args: replaced(name, args)

    handles = []
    for block in dict.fromkeys(model.blocks):
        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    if model.final_norm is not None:
        handles.append(model.final_norm.register_forward_pre_hook(end("final_norm")))
        keep = lambda module, args, output: found.outputs.update(final_norm=output)  # noqa: E731
        handles.append(model.final_norm.register_forward_hook(keep))
    if model.head is not None:
        handles.append(model.head.register_forward_pre_hook(end("head")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded(model: LM, layer: int | None, found: Alone) -> Iterator[None]:
    """The outputs of the modules directly inside one block: norms, mixers and feed-forward parts."""

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.inside[name] = output

        return keep

    children = model.blocks[layer].named_children() if layer is not None else ()
    handles = [module.register_forward_hook(hook(name)) for name, module in children]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Pass(nn.Module):
    """Stands for a block that nobody asks about; the stream is opened and closed as the block does."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.ends = (block.open, block.close)  # a tuple: the block's parameters are not this module's

    def open(self, x: Tensor) -> Tensor:
        return self.ends[0](x)

    def close(self, h: Tensor) -> Tensor:
        return self.ends[1](h)

    def forward(self, h: Tensor, given: Mapping[str, Any], *rest: Any) -> tuple[Tensor, dict[str, Any], dict[Any, Any]]:
        return h, dict(given), {}


def variant(model: LM, spec: ModelSpec, place: Place) -> LM:
    """The model of another spec with the same parameters, and only the blocks that `place` needs.

    ValueError where the spec has other parameters.
    """
    other = rebuilt(model, spec, model)
    borrows = any(getattr(b.part, "takes", None) for i in range(spec.layers) for _, _, b in spec.branches(i))
    for i in range(spec.layers):
        if i != place.layer and not (borrows and place.layer is not None and i < place.layer):
            other.blocks[i] = Pass(other.blocks[i])  # type: ignore[index]
    if place.name != "head":
        other.head = None
    return other.eval()


def rebuilt(model: LM, spec: ModelSpec, around: LM) -> LM:
    """A model of a spec with the parameters of `model`. around: whose embedding an encoder reads that has none.

    ValueError where the spec has other parameters.
    """
    with torch.device("meta"):
        other = LM(spec)
    own = dict(model.named_parameters())
    for name, _ in list(other.named_parameters()):
        if name not in own:
            raise ValueError(f"{name}: a parameter that the model does not have")
        put(other, name, own[name].detach())
    other.embed.share(around.embed)
    return other.eval()

"""What training keeps in memory: weights, gradients, moments, and what the forward pass saves for the backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from assay.cost.bill import Placed, Question, Sheet, layer_of
from assay.parts.heads.lm import LossOptions
from assay.spec.base import DTYPE_BYTES, PartSpec, Site, Weight


@dataclass(frozen=True)
class Need:
    """Bytes that a run keeps: weights, gradients, AdamW's two moments, and what one piece saves for backward."""

    weights: int
    gradients: int
    moments: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations

    def with_activations(self, count: int) -> Need:
        return replace(self, activations=count)

    def check(self, available: int, advice: str) -> None:
        """ValueError with the numbers when this is more than is available."""
        if self.total > available:
            parts = ", ".join(f"{name} {_gib(getattr(self, name))}" for name in type(self).__dataclass_fields__)
            need = f"this run needs about {_gib(self.total)} of memory ({parts})"
            raise ValueError(f"{need} and {_gib(available)} is available; {advice}")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def need_of(table: Mapping[str, Weight], precision: str) -> Need:
    """What the weights of this table take in training; bfloat16 runs keep copies of weights and gradients."""
    count = sum(w.numel for w in table.values())
    stored = sum(w.numel * DTYPE_BYTES[w.dtype] for w in table.values())
    copies = 2 * count if precision == "bfloat16" else 0
    return Need(stored + copies, stored + copies, 2 * stored)


def values_saved(part: PartSpec, site: Site) -> int:
    """Values a token that a part keeps for its backward pass, beside attention's scores.

    What a linear reads (once, where several read it), what it yields unless that goes into the stream, and again what
    an activation or a norm made of it. Exact for attention and feed-forward networks; for others an estimate.
    """
    fans = part.linears(site)
    total = site.d_in if fans or part.slot == "norms" else 0
    for name, fan in fans.items():
        total += fan.d_in if fan.out else fan.d_out * (2 if name.startswith("gate") else 1)
    for name, weight in part.own(site).items():
        if weight.role == "expert":
            experts, rows, columns = weight.shape
            total += round(weight.active * experts * (columns + rows * (2 if name == "gate" else 1)))
    for name, (child, place) in part.children(site).items():
        normed = fans.get(name.removesuffix("_norm"))  # queries and keys, once more
        total += normed.d_out if normed is not None and child.slot == "norms" else values_saved(child, place)
    return total


def score_values(one: Placed, tokens: int, memory: int) -> int:
    """Scores of a row that attention keeps where it does not make them again: one for each head and pair it multiplies.
    A product over a head's size is 2 FLOPs a value, and there are two."""
    size = one.reads[0].shape[-1] if one.part.slot == "mixers" and one.reads else 0
    return one.part.cost(one.site, tokens, 0, memory).executed // (4 * size) if size else 0


@dataclass(frozen=True)
class Training:
    """Bytes of a step on batch x context tokens at once. scores: what attention adds where it keeps its probabilities,
    as this package's own does on a CPU; tiled kernels do not. recomputed: the activations where only the input of each
    block is kept, and one block at a time is run again in the backward pass."""

    need: Need
    scores: int
    recomputed: int

    def as_json(self) -> dict[str, int]:
        names = ("weights", "gradients", "moments", "activations", "total")
        return {n: getattr(self.need, n) for n in names} | {"scores": self.scores, "recomputed": self.recomputed}


def training(sheet: Sheet, ask: Question) -> Training:
    """float32 weights with AdamW; for bf16 and f16, copies of weights and gradients beside them. Norms keep float32."""
    table, width = sheet.weights(), 4 if ask.dtype == "f32" else 2
    if sheet.encoder is not None:
        table |= {f"encoder.{name}": w for name, w in sheet.encoder.weights().items()}
    tokens, d = ask.batch * ask.context, sheet.spec.d_model
    blocks: dict[int | None, int] = {}
    for one in sheet.parts:
        kept = values_saved(one.part, one.site) * (4 if one.part.slot == "norms" else width)
        kept += width * d if one.part.slot == "heads" and not one.part.linears(one.site) else 0
        layer = layer_of(one.site.name)
        blocks[layer] = blocks.get(layer, 0) + tokens * kept
    logits = 4 * min(tokens * sheet.spec.vocab, LossOptions().piece) if sheet.spec.head is not None else 0
    rest = blocks.pop(None, 0) + logits
    scores = sum(score_values(p, ask.context, ask.memory) for p in sheet.parts)
    need = need_of(table, "float32" if ask.dtype == "f32" else "bfloat16")
    whole, again = rest + sum(blocks.values()), rest + max(blocks.values()) + len(blocks) * tokens * d * width
    return Training(need.with_activations(whole), 4 * ask.batch * scores, min(whole, again))

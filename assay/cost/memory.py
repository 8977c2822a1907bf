"""What training keeps in memory: weights, gradients, moments, and what the forward pass saves for the backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from assay.cost.bill import DTYPES, Placed, Question, Sheet, layer_of
from assay.cost.scans import is_recurrence, recurrent_bytes
from assay.ops.attend.call import compute_dtype
from assay.parts.heads.lm import LossOptions
from assay.spec.base import DTYPE_BYTES, PartSpec, Site, Weight


@dataclass(frozen=True)
class Need:
    """Bytes that a run keeps: weights, gradients, what the optimiser remembers of them (AdamW: two moments), and what
    one piece saves for backward."""

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


def need_of(table: Mapping[str, Weight], precision: str, moments: int | None = None) -> Need:
    """What the weights of this table take in training; bfloat16 runs keep copies of weights and gradients. moments:
    bytes that an optimiser other than AdamW remembers of them."""
    count = sum(w.numel for w in table.values())
    stored = sum(w.numel * DTYPE_BYTES[w.dtype] for w in table.values())
    copies = 2 * count if precision == "bfloat16" else 0
    return Need(stored + copies, stored + copies, 2 * stored if moments is None else moments)


def values_saved(part: PartSpec, site: Site) -> int:
    """Values a token that a part keeps for its backward pass, beside attention's scores.

    What a linear reads (once, where several read it), what it yields unless that goes into the stream, and again what
    an activation or a norm made of it. Exact for attention and feed-forward networks, an estimate for experts; what a
    scan keeps is not told by its linears (`scans`).
    """
    fans = part.linears(site)
    total = site.d_in if fans else site.d_in + 1 if part.slot == "norms" else 0  # its input, and its scale
    for name, fan in fans.items():
        total += fan.d_in if fan.out else fan.d_out * (2 if name.startswith("gate") else 1)
    for name, weight in part.own(site).items():
        if weight.role == "expert" and len(weight.shape) == 3:  # a bias of the experts keeps nothing
            experts, rows, columns = weight.shape
            total += round(weight.active * experts * (columns + rows * (2 if name == "gate" else 1)))
    for name, (child, place) in part.children(site).items():
        normed = fans.get(name.removesuffix("_norm"))  # queries and keys, once more
        total += normed.d_out if normed is not None and child.slot == "norms" else values_saved(child, place)
    return total


def score_values(one: Placed, tokens: int, memory: int) -> int:
    """Scores of a row that attention keeps where it does not make them again: one for each head and pair it multiplies.
    A product over a head's size is 2 FLOPs a value, and there are two."""
    # An encoder's mixer keeps nothing, and what it would keep has its head's size all the same.
    read = (one.reads or one.part.state(one.site)) if one.part.slot == "mixers" and not is_recurrence(one) else ()
    size = read[0].shape[-1] if read and tokens else 0
    return one.part.cost(one.site, tokens, 0, memory).executed // (4 * size) if size else 0


@dataclass(frozen=True)
class Training:
    """Bytes of a step on batch x context tokens at once. scores: what attention adds where it keeps its probabilities,
    as this package's own does on this machine's CPU; tiled kernels do not. recomputed: the activations where only the
    input of each block is kept, and one block at a time is run again in the backward pass."""

    need: Need
    scores: int
    recomputed: int

    def as_json(self) -> dict[str, int]:
        names = ("weights", "gradients", "moments", "activations", "total")
        return {n: getattr(self.need, n) for n in names} | {"scores": self.scores, "recomputed": self.recomputed}


def training(sheet: Sheet, ask: Question) -> Training:
    """float32 weights with AdamW; for bf16 and f16, copies of weights and gradients beside them. Norms keep float32.
    An encoder reads `memory` tokens."""
    ask = ask.floats
    table, width = sheet.weights(), 4 if ask.dtype == "f32" else 2
    found = kept_by_part(sheet, ask.batch, ask.context, ask.dtype)
    inputs = ask.batch * ask.context * sheet.spec.d_model * width * sheet.spec.layers
    scores = sum(score_values(p, ask.context, ask.memory) for p in sheet.parts)
    if (encoder := sheet.encoder) is not None:
        table |= {f"encoder.{name}": w for name, w in encoder.weights().items()}
        more = kept_by_part(encoder, ask.batch, ask.memory, ask.dtype)
        found |= {f"encoder.{name}": count for name, count in more.items()}
        inputs += ask.batch * ask.memory * encoder.spec.d_model * width * encoder.spec.layers
        scores += sum(score_values(p, ask.memory, 0) for p in encoder.parts)
    blocks = [count for name, count in found.items() if "blocks." in name]
    need = need_of(table, "float32" if ask.dtype == "f32" else "bfloat16").with_activations(sum(found.values()))
    again = need.activations - sum(blocks) + max(blocks) + inputs
    # What multiplies them is also what keeps them: float32 where this CPU would only emulate the asked dtype.
    wide = compute_dtype(torch.empty(0, dtype=getattr(torch, DTYPES[ask.dtype]))).itemsize
    return Training(need, wide * ask.batch * scores, min(need.activations, again))


def part_bytes(one: Placed, width: int) -> int:
    """A token's share. Of a head without logits, which are never there for all tokens; a tied head, which has no linear
    of its own, reads its features too."""
    count, fans = values_saved(one.part, one.site), one.part.linears(one.site)
    if one.part.slot == "norms":
        return 4 * count
    if one.part.slot == "heads":
        count += -sum(fan.d_out for fan in fans.values() if fan.d_out == one.site.d_out) if fans else one.site.d_in
    return width * count


def kept_by_part(sheet: Sheet, rows: int, length: int, dtype: str) -> dict[str, int]:
    """Bytes of each block, and of each part outside them: the ids are the embedding's, the logits that the loss holds
    at once the head's."""
    found, width = {f"blocks.{layer}": 0 for layer in range(sheet.spec.layers)}, 4 if dtype == "f32" else 2
    found["embed"] = 8 * rows * length
    if sheet.spec.head:
        found["head"] = 4 * min(rows * length * sheet.spec.vocab, LossOptions().piece)
    for one in sheet.parts:
        layer = layer_of(one.site.name)
        name = one.site.name if layer is None else f"blocks.{layer}"
        if layer is not None and is_recurrence(one) and rows * length:
            count = recurrent_bytes(one, sheet.spec.positions, (rows, length), dtype)
        else:
            count = rows * length * part_bytes(one, width)
        found[name] = found.get(name, 0) + count
    return found

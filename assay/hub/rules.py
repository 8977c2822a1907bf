"""How tensors of a checkpoint become parameters, and parameters tensors again: each layout once, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.spec.base import PartSpec, Site

Shape = tuple[int, ...]


def turned(x: Tensor) -> Tensor:
    """A matrix transposed; a vector as it is."""
    return x.mT if x.dim() == 2 else x


@dataclass(frozen=True)
class Place:
    """Where a rule applies: the parameters it fills (a fused tensor fills several) and the part that owns them."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    part: PartSpec
    site: Site

    @property
    def rows(self) -> list[int]:
        return [shape[0] for shape in self.shapes]


@dataclass(frozen=True)
class Rule:
    """One tensor is one parameter. `theirs` is the name in the file, `*` for each part that our pattern matched."""

    theirs: str

    def shapes(self, place: Place) -> list[Shape]:
        """Of the tensors in the file, in the order of their names."""
        return [place.shapes[0]]

    def count(self, place: Place) -> int | None:
        """How many numbered tensors (`#` in the name) the rule reads; None for one without a number."""
        return None

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        return list(tensors)

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        return list(ours)


@dataclass(frozen=True)
class Transposed(Rule):
    """A matrix stored [in, out] (GPT-2's Conv1D); a vector is as it is."""

    def shapes(self, place: Place) -> list[Shape]:
        return [place.shapes[0][::-1]]

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [turned(tensors[0])]

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [turned(ours[0])]


@dataclass(frozen=True)
class Fused(Rule):
    """Several matrices (or their biases) one under the other; transposed: [in, out], side by side."""

    transposed: bool = False

    def shapes(self, place: Place) -> list[Shape]:
        whole = (sum(place.rows), *place.shapes[0][1:])
        return [whole[::-1] if self.transposed else whole]

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        whole = turned(tensors[0]) if self.transposed else tensors[0]
        return list(whole.split(place.rows))

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        whole = torch.cat(list(ours))
        return [turned(whole) if self.transposed else whole]


@dataclass(frozen=True)
class FusedHeads(Fused):
    """Rows head by head: [heads][q, k, v][head_dim] (GPT-NeoX, BLOOM)."""

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        heads, kinds = heads_of(place.part), len(place.names)
        grouped = tensors[0].unflatten(0, (heads, kinds, -1))
        return [grouped[:, i].flatten(0, 1) for i in range(kinds)]

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        heads = heads_of(place.part)
        return [torch.stack([t.unflatten(0, (heads, -1)) for t in ours], 1).flatten(0, 2)]


@dataclass(frozen=True)
class Pairs(Rule):
    """Rows of queries or keys whose RoPE turns neighbours (0, 1), (2, 3), ...: ours turns halves.

    size: rows of a head, null is the part's head_dim; first, dim: the rows of it that are turned, null is all.
    """

    size: int | None = None
    first: int = 0
    dim: int | None = None

    def order(self, place: Place) -> Tensor:
        """For each of our rows the row of the file."""
        size = self.size or head_dim_of(place)
        dim = self.dim or size - self.first
        turned = torch.arange(dim).view(-1, 2).T.flatten() + self.first
        head = torch.cat([torch.arange(self.first), turned, torch.arange(self.first + dim, size)])
        return (torch.arange(place.rows[0] // size)[:, None] * size + head).flatten()

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [tensors[0][self.order(place)]]

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [ours[0][torch.argsort(self.order(place))]]


@dataclass(frozen=True)
class Experts(Rule):
    """A tensor for each expert, `#` in the name: stacked [E, ...]."""

    def shapes(self, place: Place) -> list[Shape]:
        return [place.shapes[0][1:]] * place.rows[0]

    def count(self, place: Place) -> int | None:
        return place.rows[0]

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [torch.stack(list(tensors))]

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        return list(ours[0])


@dataclass(frozen=True)
class Packed(Rule):
    """All experts in one tensor, several of our matrices in it: [E, out, in], or [E, in, out] where transposed.

    columns: the matrices one after the other (`halves`), or taking turns row by row (`turns`). Biases are [E, out].
    """

    transposed: bool = True
    columns: str = "halves"

    def shapes(self, place: Place) -> list[Shape]:
        e, _, *rest = place.shapes[0]
        out = sum(shape[1] for shape in place.shapes)
        return [(e, *rest, out) if self.transposed and rest else (e, out, *rest)]

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        whole = tensors[0].transpose(1, 2) if self.transposed and tensors[0].dim() == 3 else tensors[0]
        kinds = len(place.names)
        if self.columns == "turns":
            return [whole[:, i::kinds] for i in range(kinds)]
        return list(whole.split([shape[1] for shape in place.shapes], 1))

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        whole = torch.stack(list(ours), 2).flatten(1, 2) if self.columns == "turns" else torch.cat(list(ours), 1)
        return [whole.transpose(1, 2) if self.transposed and whole.dim() == 3 else whole]


@dataclass(frozen=True)
class Tail(Rule):
    """A table whose first `skip` rows no token reads (BART's and RoBERTa's positions). Written back as zeros."""

    skip: int = 2

    def shapes(self, place: Place) -> list[Shape]:
        rows, *rest = place.shapes[0]
        return [(rows + self.skip, *rest)]

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [tensors[0][self.skip :]]

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [torch.cat([ours[0].new_zeros(self.skip, *ours[0].shape[1:]), ours[0]])]


@dataclass(frozen=True)
class Shaped(Rule):
    """The same numbers in another shape: `shape` may have one -1 and is the file's."""

    shape: Shape = (-1,)

    def shapes(self, place: Place) -> list[Shape]:
        return [tuple(torch.empty(place.shapes[0], device="meta").view(self.shape).shape)]

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [tensors[0].reshape(place.shapes[0])]

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [ours[0].reshape(self.shape)]


@dataclass(frozen=True)
class Depthwise(Fused):
    """Filters of one channel each, as torch's Conv1d has them: [channels, 1, taps]; those of several convolutions
    stand one under the other."""

    def shapes(self, place: Place) -> list[Shape]:
        return [(sum(place.rows), 1, place.shapes[0][1])]

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        return super().read([tensors[0].squeeze(1)], place)

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        return [super().write(ours, place)[0].unsqueeze(1)]


def heads_of(part: Any) -> int:
    return int(part.heads)


def head_dim_of(place: Place) -> int:
    part: Any = place.part
    return int(part.size(place.site))

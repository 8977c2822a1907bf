"""Work on whole matrices, dealt out to the processes that hold them or pieces of them: each matrix is one's.

Pieces go to the matrix's owner and pieces of the result come back, in one exchange each (as Liu et al. 2025, arXiv
2502.16982, section 2.3.2, without an order of ranks). Of k matrices of M bytes on n processes, each P-th of which holds
the same piece, a process sends k M / n ((P - 1) / P + (n - 1) / P) on average: with shards (P = n) nearly 2 k M / n,
where gathering sends k M; with replicas (P = 1) k M, and each works on k / n of them, not on k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from assay.parts.cut import piece, whole
from assay.spec.shard import Cut
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.replicas import local
from assay.train.parallel.spec import AXES

Work = Callable[[Tensor], Tensor]
SIDES = 2
"""A matrix is the last two dimensions of a weight; what is cut before them is many matrices."""


@dataclass(frozen=True)
class Layout:
    """How the processes of a group hold one weight. shape: of the whole, but for what is other matrices elsewhere.
    sharded: its rows are cut along `shard`, after `cut`."""

    mesh: Mesh
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    cut: Cut | None
    sharded: bool

    @classmethod
    def of(cls, parameter: Tensor, cut: Cut | None, mesh: Mesh) -> Layout:
        """The group is along all axes but those along which processes hold other matrices."""
        first, sharded = parameter.dim() - SIDES, isinstance(parameter, DTensor)
        apart = {"pipeline"} | ({"shard"} if sharded and first else set())
        if cut is not None and cut.dim < first:
            apart, cut = apart | {cut.axis}, None
        axes = tuple(axis for axis in AXES if axis not in apart and mesh.size(axis) > 1)
        shape = list((local(parameter) if first else parameter).shape)
        if cut is not None:
            shape[cut.dim] *= cut.place(0, mesh.size(cut.axis))[1]
        return cls(mesh, axes, tuple(shape), cut, sharded and not first)

    @cached_property
    def places(self) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
        """Of each process in the group, in order: its piece (along the cut axis, along `shard`), and of which copy."""
        found, sizes = [], [self.mesh.size(axis) for axis in self.axes]
        for rank in range(int(np.prod(sizes, dtype=int))):
            at = dict(zip(self.axes, (int(i) for i in np.unravel_index(rank, sizes)), strict=True))
            shard = at.pop("shard") if self.sharded else 0
            place = 0
            if self.cut is not None:
                place, at[self.cut.axis] = divmod(at[self.cut.axis], self.cut.copies)
            found.append(((place, shard), tuple(at.values())))
        return found

    def givers(self, owner: int) -> list[int]:
        """One process for each piece, in the order of pieces: of the owner's own set of copies."""
        same = [rank for rank, (_, copy) in enumerate(self.places) if copy == self.places[owner][1]]
        return sorted(same, key=lambda rank: self.places[rank][0])

    def part(self, full: Tensor, rank: int) -> Tensor:
        """What the group's process `rank` holds of a whole matrix."""
        place, shard = self.places[rank][0]
        if self.cut is not None:
            full = piece(full, replace(self.cut, copies=1), place, self._cuts)
        if not self.sharded:
            return full
        most = -(-full.shape[0] // self.mesh.size("shard"))
        return full[most * shard : most * (shard + 1)]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole, from pieces in the order of `givers`."""
        each = self.mesh.size("shard") if self.sharded else 1
        rows = [torch.cat(list(pieces[i : i + each])) for i in range(0, len(pieces), each)]
        return rows[0] if self.cut is None else whole(rows, replace(self.cut, copies=1))

    @property
    def _cuts(self) -> int:
        return 1 if self.cut is None else self.cut.place(0, self.mesh.size(self.cut.axis))[1]


def owners(shapes: Sequence[tuple[int, ...]], processes: int) -> list[int]:
    """Whose each matrix is: the largest product goes first, to the process with least to do."""
    work = [math.prod(shape) * min(shape[-SIDES:]) for shape in shapes]
    load, found = [0] * processes, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -work[i]):
        found[i] = min(range(processes), key=lambda rank: load[rank])
        load[found[i]] += work[i]
    return found


def dealt(held: Mapping[str, Tensor], layouts: Mapping[str, Layout], work: Work) -> dict[str, Tensor]:
    """`work` of each whole matrix, as this process holds it; held: its parts, in an order that is everybody's."""
    found: dict[str, Tensor] = {}
    for axes in dict.fromkeys(layouts[name].axes for name in held):
        some = {name: held[name] for name in held if layouts[name].axes == axes}
        found |= _in_group(some, layouts, work) if axes else {name: work(t) for name, t in some.items()}
    return found


def _in_group(held: Mapping[str, Tensor], layouts: Mapping[str, Layout], work: Work) -> dict[str, Tensor]:
    """Those that the processes of one group hold."""
    names, first = list(held), layouts[next(iter(held))]
    rank, count = first.mesh.rank(*first.axes), first.mesh.size(*first.axes)
    owner = dict(zip(names, owners([layouts[name].shape for name in names], count), strict=True))
    mine = [name for name in names if owner[name] == rank]
    givers = {name: layouts[name].givers(owner[name]) for name in names}
    blank = {name: torch.empty(layouts[name].shape, device="meta") for name in names}
    shapes = {name: [layouts[name].part(blank[name], r).shape for r in range(count)] for name in names}

    none = held[names[0]].new_empty(0)
    give = [[held[n] for n in names if owner[n] == to and rank in givers[n]] for to in range(count)]
    take = [[shapes[n][source] for n in mine if source in givers[n]] for source in range(count)]
    came = [iter(some) for some in _exchanged(give, take, first, none)]
    done = {name: work(layouts[name].joined([next(came[source]) for source in givers[name]])) for name in mine}

    give = [[layouts[n].part(done[n], to) for n in mine] for to in range(count)]
    take = [[shapes[n][rank] for n in names if owner[n] == source] for source in range(count)]
    came = [iter(some) for some in _exchanged(give, take, first, none)]
    return {name: next(came[owner[name]]) for name in names}


def _exchanged(
    give: list[list[Tensor]], take: list[list[torch.Size]], layout: Layout, none: Tensor
) -> list[list[Tensor]]:
    """give[i]: what goes to process i. Returns what came from each, in the shapes that are told. none: an empty tensor,
    which is what a process sends where it has nothing to give."""
    flat = [t.reshape(-1) for some in give for t in some]
    sizes = [[shape.numel() for shape in some] for some in take]
    came = layout.mesh.comm.all_to_all(
        torch.cat([none, *flat]),
        [sum(t.numel() for t in some) for some in give],
        [sum(some) for some in sizes],
        layout.mesh.group(*layout.axes),
    )
    parts = iter(came.split([n for some in sizes for n in some]))
    return [[next(parts).view(shape) for shape in some] for some in take]

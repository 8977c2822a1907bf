"""Matrices dealt out over meshes of up to eight processes, which are threads here that pass one another tensors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.spec.shard import Cut
from assay.train.parallel.dealt import Layout, dealt, owners
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.spec import AXES, ParallelSpec

SHAPES = {"wide": (8, 12), "tall": (20, 4), "odd": (4, 5)}
CASES: list[tuple[dict[str, int], Cut | None]] = [
    ({"data": 3}, None),
    ({"shard": 4}, None),
    ({"data": 2, "shard": 2}, None),
    ({"tensor": 4}, Cut("tensor", 0)),
    ({"shard": 3, "tensor": 2}, Cut("tensor", 0)),
    ({"data": 2, "shard": 2, "tensor": 2}, Cut("tensor", 0, copies=2)),
    ({"data": 2, "tensor": 4}, Cut("tensor", 0, copies=2)),
]


class Post:
    """What one thread sends reaches the others when all have sent."""

    def __init__(self, count: int) -> None:
        self.sent: list[Sequence[Tensor]] = [()] * count
        self.bytes, self.calls = [0] * count, [0] * count
        self.all = threading.Barrier(count, timeout=20.0)

    def at(self, rank: int) -> Any:
        post = self

        class Here:
            def all_to_all(self, x: Tensor, give: list[int], take: list[int], group: object) -> Tensor:
                post.sent[rank] = x.split(give)
                post.bytes[rank] += 8 * (sum(give) - give[rank])
                post.calls[rank] += 1
                post.all.wait()
                found = torch.cat([some[rank] for some in post.sent])
                post.all.wait()
                assert len(found) == sum(take)
                return found

        return Here()


def held(full: Tensor, mesh: Mesh, cut: Cut | None) -> Tensor:
    """A process's rows: of as many blocks as there are different pieces, its own; of that the `shard`'s rows."""
    if cut is not None:
        rows = full.shape[0] * cut.copies // mesh.size("tensor")
        first = mesh.rank("tensor") // cut.copies * rows
        full = full[first : first + rows]
    most = -(-full.shape[0] // mesh.size("shard"))
    return full[most * mesh.rank("shard") :][:most]


@pytest.mark.parametrize(("sizes", "cut"), CASES)
def test_each_matrix_is_worked_on_once_and_every_process_has_its_part(
    sizes: dict[str, int], cut: Cut | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mesh, "group", lambda self, *axes: None)
    spec = ParallelSpec(**sizes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    full = {k: torch.randn(*s, generator=generator, dtype=torch.float64) for k, s in SHAPES.items()}
    post, worked = Post(spec.processes), list[tuple[int, ...]]()
    axes = tuple(axis for axis in AXES if sizes.get(axis, 1) > 1)

    def work(x: Tensor) -> Tensor:
        worked.append(tuple(x.shape))
        return x @ x.mT @ x  # needs all of it

    def process(rank: int) -> tuple[Mesh, dict[str, Tensor]]:
        mesh = Mesh(spec, rank)
        mesh.comm = post.at(rank)
        layouts = {k: Layout(mesh, axes, s, cut, spec.shard > 1) for k, s in SHAPES.items()}
        return mesh, dealt({k: held(t, mesh, cut) for k, t in full.items()}, layouts, work)

    with ThreadPoolExecutor(spec.processes) as pool:
        found = list(pool.map(process, range(spec.processes)))
    assert sorted(worked) == sorted(SHAPES.values())
    assert post.calls == [2] * spec.processes
    for mesh, mine in found:
        for name, x in full.items():
            torch.testing.assert_close(mine[name], held(x @ x.mT @ x, mesh, cut), rtol=1e-12, atol=1e-12)
    pieces = spec.shard * (spec.tensor // cut.copies if cut is not None else 1)
    even = [x.nbytes for x in full.values() if x.shape[0] % pieces == 0]
    if len(even) == len(full):
        assert sum(post.bytes) == sum((pieces - 1 + spec.processes - 1) * size // pieces for size in even)


def test_the_largest_products_go_to_different_processes() -> None:
    assert owners([(2, 2), (64, 64), (2, 2), (8, 64, 64), (64, 64)], 2) == [1, 1, 1, 0, 1]
    assert owners([(4, 4)] * 6, 3) == [0, 1, 2, 0, 1, 2]

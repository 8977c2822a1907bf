"""The processes of a run as a grid with named axes. One process alone is a grid of ones, without a process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from assay.train.parallel.comm import Comm
from assay.train.parallel.roll import Roll, guarded
from assay.train.parallel.spec import AXES, ParallelSpec

LOOPBACK = "lo"


class Mesh:
    """Where this process stands on each axis, and the groups of processes that differ along some axes only.

    comm: counted collectives. A group is made when it is first asked for, which every process has to do.
    """

    def __init__(self, spec: ParallelSpec, rank: int = 0, kind: str = "cpu") -> None:
        self.spec, self.kind, self.comm = spec, kind, Comm()
        self.number, self.processes = rank, spec.processes
        self._grid = np.arange(self.processes).reshape(tuple(spec.sizes.values()))
        self._place = dict(zip(AXES, (int(i) for i in np.unravel_index(rank, self._grid.shape)), strict=True))
        self._groups: dict[tuple[tuple[str, ...], int], dist.ProcessGroup] = {}

    @classmethod
    def of(cls, spec: ParallelSpec, device: str = "cpu") -> Mesh:
        """The mesh of the process group that is open. ValueError where it has another number of processes."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        check_processes(spec, world)
        return cls(spec, dist.get_rank() if world > 1 else 0, device)

    def size(self, *axes: str) -> int:
        """How many processes there are along the axes together."""
        return self.spec.size(*axes)

    def rank(self, *axes: str) -> int:
        """This process's place along the axes together, the first of them the outermost."""
        place = 0
        for axis in axes:
            place = place * self.size(axis) + self._place[axis]
        return place

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The processes that differ from this one along these axes at most, in the order of their `rank`; None where
        it is alone."""
        wide = tuple(axis for axis in AXES if axis in axes and self.size(axis) > 1)
        if not wide:
            return None
        return self._found(wide, self.size(*wide))

    def block(self, axis: str, count: int) -> dist.ProcessGroup | None:
        """So many neighbours along an axis, this process among them; None where it is alone."""
        return self._found((axis,), count) if count > 1 else None

    def _found(self, wide: tuple[str, ...], count: int) -> dist.ProcessGroup:
        if (wide, count) not in self._groups:
            self._groups[wide, count] = self._made(wide, count)
        return self._groups[wide, count]

    def _made(self, wide: tuple[str, ...], count: int) -> dist.ProcessGroup:
        if count == self.processes:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        order = [AXES.index(axis) for axis in AXES if axis not in wide] + [AXES.index(axis) for axis in wide]
        rows = self._grid.transpose(order).reshape(-1, count).tolist()
        own, _ = dist.new_subgroups_by_enumeration(rows, timeout=timedelta(seconds=self.spec.timeout_s))
        return own

    def torch_mesh(self, axis: str) -> DeviceMesh:
        """One axis, as torch's own sharding takes it."""
        group = self.group(axis)
        assert group is not None
        return DeviceMesh.from_group(group, self.kind, mesh_dim_names=(axis,))

    def sharing(self, device: torch.device) -> int:
        """How many processes have the memory of this device."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.processes > 1 and device.type == "cpu" else 1

    @property
    def everyone(self) -> dist.ProcessGroup | None:
        return self.group(*AXES)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.number == 0


def check_processes(spec: ParallelSpec, world: int) -> None:
    if spec.processes != world:
        sizes = " x ".join(f"{axis} {size}" for axis, size in spec.sizes.items() if size > 1) or "one process"
        raise ValueError(
            f"recipe.parallel: {sizes} makes {spec.processes} processes; {world} were started "
            f"(torchrun --nproc-per-node): accepted: axes whose product is {world}"
        )


@contextmanager
def opened(spec: ParallelSpec, device: torch.device) -> Iterator[Mesh]:
    """The mesh of this run. Under torchrun the process group is opened, and closed afterwards; one that is open already
    is used. Between processes of one machine, connections are made over its loopback interface alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized() or (world == 1 and spec.processes == 1):
        yield Mesh.of(spec, device.type)
        return
    check_processes(spec, world)
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    wait = timedelta(seconds=spec.timeout_s)
    store, rank, _ = next(rendezvous("env://", timeout=wait))
    # One store may serve all restarts: what the processes before this one wrote is not read.
    store = PrefixStore(f"restart/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        backend_for(device), store=PrefixStore("groups", store), rank=rank, world_size=world, timeout=wait
    )
    try:
        roll = Roll(PrefixStore("roll", store), rank, world)
        with guarded(roll):
            mesh = Mesh.of(spec, device.type)
            roll.progress = mesh.comm.calls.total
            yield mesh
    finally:
        dist.destroy_process_group()


def backend_for(device: torch.device) -> str:
    """Gloo for tensors on the host, which every run exchanges some of, and NCCL beside it on CUDA."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def own_device(device: torch.device | str) -> torch.device:
    """The device of this process: under torchrun, each process of a machine takes a GPU of its own."""
    place = torch.device(device)
    if str(place) == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return place

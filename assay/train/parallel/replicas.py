"""Data parallelism: each process reads rows of its own, and the gradients are summed. With `shard`, weights, gradients
and moments are cut as well, and a block's weights are gathered when it runs (ZeRO-3: Rajbhandari et al. 2020, arXiv
1910.02054), by torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor, distribute_tensor

from assay.model.lm import LM
from assay.train.parallel.comm import Comm, Group
from assay.train.parallel.mesh import Mesh

BUCKET = 25 << 20
"""Bytes of gradients that are summed in one exchange."""


def apply(model: LM, mesh: Mesh, precision: str) -> None:
    """Shard the model's weights along `shard`: a unit for each block, and one around them for what is left, which is
    gathered for the whole step. Blocks that several layers share belong to the latter.

    In bfloat16 gathered copies are in it, and gradients are summed in float32, where the optimiser works. What the
    blocks are given is not cast: angles are float32. Weights that no gradient reaches stay whole. With `offload` the
    model is to be on the host, and parts of it stay there (`placed`).
    """
    found = torch.bfloat16 if precision == "bfloat16" else None
    low = MixedPrecisionPolicy(found, torch.float32 if found else None, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    host = CPUOffloadPolicy(pin_memory=mesh.kind == "cuda") if mesh.spec.offload else OffloadPolicy()
    line = mesh.torch_mesh("shard")
    sources = model.spec.sources
    for layer, block in enumerate(model.blocks):
        if sources.count(layer) == 1:
            fully_shard(block, mesh=line, mp_policy=low, offload_policy=host, ignored_params=frozen)
    fully_shard(model, mesh=line, mp_policy=low, offload_policy=host, ignored_params=frozen)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_custom_all_gather(Gather(mesh.comm))
        unit.set_custom_reduce_scatter(Scatter(mesh.comm))


@torch.no_grad()
def placed(model: LM, device: torch.device, offload: bool) -> None:
    """Put the model onto a device; with `offload` all but what is cut."""
    if not offload:
        model.to(device)
        return
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for p in model.parameters():
        if not isinstance(p, DTensor):
            p.data = p.data.to(device)


def units(model: nn.Module) -> Iterable[FSDPModule]:
    return (m for m in model.modules() if isinstance(m, FSDPModule))


class _Room:
    """Buffers for what is exchanged, and the count of it."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(_Room, AllGather):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return self.comm.gather_into(output_tensor, input_tensor, group, not async_op)


class Scatter(_Room, ReduceScatter):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        return self.comm.scatter_into(output_tensor, input_tensor, group, not async_op)


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def gathered(x: Tensor) -> Tensor:
    """The whole of a tensor that is cut along `shard`; all processes have to ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def all_rows(held: Tensor, parameter: Tensor, mesh: Mesh) -> Tensor:
    """The whole of what processes hold parts of as they do of this parameter: its rows, one process's after another's,
    as many for each but the last ones."""
    if not isinstance(parameter, DTensor):
        return held
    most = -(-parameter.shape[0] // mesh.size("shard"))
    padded = torch.cat([held, held.new_zeros(most - held.shape[0], *held.shape[1:])])
    return mesh.comm.all_gather(padded, mesh.group("shard")).flatten(0, 1)[: parameter.shape[0]]


def own_rows(whole: Tensor, parameter: Tensor, mesh: Mesh) -> Tensor:
    """This process's part of what `all_rows` returned."""
    if not isinstance(parameter, DTensor):
        return whole
    most = -(-parameter.shape[0] // mesh.size("shard"))
    return whole[most * mesh.rank("shard") : most * (mesh.rank("shard") + 1)]


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the parameter is held: this process's part of it where that is cut along `shard`."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def summed(tensors: list[Tensor], comm: Comm, group: Group) -> None:
    """Each tensor becomes its sum over the processes of a group, in exchanges of up to BUCKET bytes."""
    if group is None:
        return
    for bucket in buckets(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        comm.all_reduce(flat, group)
        for t, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(total.view_as(t))


def buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype, together at most BUCKET bytes (or one tensor)."""
    found: list[list[Tensor]] = []
    for t in tensors:
        last = found[-1] if found else []
        if last and last[0].dtype == t.dtype and sum(x.nbytes for x in last) + t.nbytes <= BUCKET:
            last.append(t)
        else:
            found.append([t])
    return found

"""What the tests of the plans share: models, batches, steps of training, and processes that run a function together."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.data.loader import Batch
from assay.model.lm import LM, build
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from assay.spec.shard import Deal
from assay.train.parallel.mesh import LOOPBACK, Mesh
from assay.train.parallel.spec import ParallelSpec

Found = dict[str, Tensor]


def model(mixer: dict[str, Any], ffn: dict[str, Any] | None = None, **more: Any) -> ModelSpec:
    """Two blocks of width 16, a vocabulary of 32, documents of up to 16 tokens."""
    block = {"mixer": mixer, "ffn": ffn or {"kind": "gated", "width": 24}}
    base: dict[str, Any] = {"d_model": 16, "vocab": 32, "layers": 2, "context": 16, "blocks": {"b": block}}
    return validate(ModelSpec, base | {"positions": {"rope": {"kind": "rope"}}} | more, "model")


def batch(number: int, rows: int = 2, length: int = 16) -> Batch:
    """Packed documents: each row is cut at a place of its own; some tokens are no target."""
    generator = torch.Generator().manual_seed(number)
    n = rows * length
    ids = torch.randint(32, (n,), generator=generator)
    targets = torch.randint(32, (n,), generator=generator).masked_fill(torch.rand(n, generator=generator) < 0.2, -1)
    cuts = torch.randint(1, length, (rows,), generator=generator).tolist()
    sizes = [size for cut in cuts for size in (cut, length - cut)]
    seq = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    index = torch.cat([torch.arange(size) for size in sizes])
    starts = torch.tensor([0, *sizes]).cumsum(0)
    return Batch(ids, targets, seq, index, starts, torch.ones_like(ids), (rows, length))


def built(spec: ModelSpec) -> LM:
    """In float64, its vectors moved off their initial constants, where biases would be zero."""
    made = build(spec, seed=3).double().train()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n), dtype=p.dtype))
    return made


def alike(found: list[Found], place: str, losses: Tensor, made: LM, close: float = 1e-10) -> None:
    """Every rank's losses and joined weights under `place` are these, to 1e-10 and `close`."""
    for rank in found:
        torch.testing.assert_close(rank[f"{place}/losses"], losses, rtol=1e-10, atol=1e-10)
        for key, p in made.named_parameters():
            torch.testing.assert_close(
                rank[f"{place}/w/{key}"], p.detach(), rtol=close, atol=close, msg=f"{place} {key}"
            )


def together(work: str, processes: int, limit_s: float = 300.0) -> list[Found]:
    """Run `module:function(rank, processes) -> tensors` in as many processes, which meet in a file of theirs."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _run, (work, processes, folder), nprocs=processes, join=False, start_method="spawn"
        )
        assert context is not None
        for _ in range(int(limit_s)):
            if context.join(1.0):
                break
        else:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{work}: not done after {limit_s} s")
        return [load_file(Path(folder) / f"{rank}.safetensors") for rank in range(processes)]


def _run(rank: int, work: str, processes: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    module, _, name = work.partition(":")
    try:
        function: Callable[[int, int], Found] = getattr(__import__(module, fromlist=[name]), name)
        save_file({k: v.contiguous() for k, v in function(rank, processes).items()}, f"{folder}/{rank}.safetensors")
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        raise
    finally:
        dist.destroy_process_group()


def mesh_of(**sizes: int) -> Mesh:
    return Mesh.of(ParallelSpec(**sizes))  # type: ignore[arg-type]


@torch.no_grad()
def settle(model: LM, found: Deal, mesh: Mesh) -> None:
    """After the backward passes of a step: sum the gradients that each `tensor` rank has a part of, as the learner
    does."""
    if not found.partial or mesh.size("tensor") == 1:
        return
    named = [(n, p) for n, p in model.named_parameters() if n in found.partial and p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named]
    flat = torch.cat([g.reshape(-1) for g in grads])
    mesh.comm.all_reduce(flat, mesh.group("tensor"))
    for (_, p), g, total in zip(named, grads, flat.split([g.numel() for g in grads]), strict=True):
        p.grad = total.view_as(g)

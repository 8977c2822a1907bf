"""Whether a run fits in memory, asked before it starts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from assay.model.lm import LM
from assay.parts.heads.lm import LossOptions
from assay.train.parallel.replicas import local

CGROUP = Path("/sys/fs/cgroup")


class SavedForBackward:
    """Counts what autograd saves for backward inside `with`: each storage once, parameters not."""

    def __init__(self, model: LM) -> None:
        self._weights = {local(p).untyped_storage().data_ptr() for p in model.parameters()}
        self._found: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an address says which storage only while the storage lives
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._found[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)
        return tensor.detach()  # an output that is kept with its own graph would keep that for ever

    def __enter__(self) -> SavedForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._alive.clear()

    @property
    def bytes(self) -> int:
        return sum(self._found.values())


def available_bytes(device: torch.device) -> int:
    """Memory that a process can still have: of the accelerator, or of the machine within its control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min(_machine(), _control_group())


def loss_piece(device: torch.device) -> int:
    """How many logits the loss holds at once. On a CPU few: they stay in cache. An accelerator wants large products,
    and few of them: the logits may take a quarter of its free memory (about twelve bytes each, with their gradient)."""
    if device.type == "cpu":
        return LossOptions().piece
    return 1 << max(LossOptions().piece, available_bytes(device) // 48).bit_length() - 1


def _machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 2**63  # not Linux: the machine does not say, and nothing is refused
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 2**63)


def _control_group() -> int:
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text("ascii").strip() for name in ("max", "current"))
    except OSError:
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - int(used))

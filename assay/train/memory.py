"""Whether a run fits in memory, asked before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from assay.model.lm import LM
from assay.spec.base import DTYPE_BYTES, Weight

CGROUP = Path("/sys/fs/cgroup")


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


class SavedForBackward:
    """Counts what autograd saves for backward inside `with`: each storage once, parameters not."""

    def __init__(self, model: LM) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._found: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an address says which storage only while the storage lives
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._found[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)
        return tensor

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

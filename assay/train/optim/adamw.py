"""AdamW, and optimiser state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from assay.train.optim.groups import Group
from assay.train.optim.specs import AdamWSpec
from assay.train.parallel.replicas import local

if TYPE_CHECKING:
    from assay.train.optim.base import Given

FUSED = ("cpu", "cuda", "mps")
TRAINED = "trained"
"""State's name for a weight as it is trained, while the model has another one in its place (an average)."""


def adamw(spec: AdamWSpec, found: Sequence[Group]) -> torch.optim.AdamW:
    """torch's AdamW over the groups; its learning rate is set before every step. Fused where the device allows."""
    parameters = [p for group in found for p in group.parameters.values()]
    fused = all(p.device.type in FUSED and p.is_floating_point() for p in parameters)
    settings = [
        {"params": list(g.parameters.values()), "weight_decay": spec.weight_decay if g.decay else 0.0} for g in found
    ]
    return torch.optim.AdamW(settings, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=fused)


def build(spec: AdamWSpec, given: Given) -> torch.optim.Optimizer:
    return adamw(spec, given.groups)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Everything the optimiser remembers, as `<weight>/<key>` -> tensor (`blocks.0.mixer.q.weight/exp_avg`)."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def load_state(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave. ValueError for a weight that the model lacks, or one of another shape."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, what = key.rpartition("/")
        if name not in parameters:
            raise ValueError(f"state of {name!r}, which is no weight of this model")
        parameter = parameters[name]
        if tensor.dim() == parameter.dim() and tensor.shape != parameter.shape:
            raise ValueError(f"{key}: shape {list(tensor.shape)}, the weight has {list(parameter.shape)}")
        if what == TRAINED:
            local(parameter).copy_(local(tensor))
            continue
        # Numbers stay on the host, but for the steps that the fused kernel counts.
        on_host = tensor.dim() == 0 != parameter.dim() and not (what == "step" and optimizer.defaults.get("fused"))
        place = tensor.device if on_host else parameter.device
        optimizer.state[parameter][what] = tensor.to(place, copy=True)

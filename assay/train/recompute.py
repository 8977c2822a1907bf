"""What is computed again in the backward pass, so that it need not be kept until then. Gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from assay.model.lm import LM
from assay.train.parallel.spec import Recompute

PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm")
    if hasattr(torch.ops.aten, name)
)
"""What `selective` keeps: products, which cost more to make again than their results take."""


def apply(model: LM, how: Recompute) -> None:
    """Every block keeps its input, and with `selective` the results of its products. Chen et al. 2016, arXiv
    1604.06174; Korthikanti et al. 2022, arXiv 2205.05198, section 5. What `selective` keeps stands beside autograd's
    own, where `memory.SavedForBackward` does not see it."""
    if how == "none":
        return
    for block in dict.fromkeys(model.blocks):
        setattr(block, "forward", partial(again, Shell(block.forward, block), how))  # noqa: B010
    if model.encoder is not None:
        apply(model.encoder, how)


class Shell(nn.Module):
    """A block's forward pass with weights that are given."""

    def __init__(self, forward: Callable[..., Any], block: nn.Module) -> None:
        super().__init__()
        self.call, self.block = forward, block

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


def again(shell: Shell, how: Recompute, *args: Any) -> Any:
    """The block's result. Its weights are those of now also when it is run again: they may be copies in another
    precision, which are there for one forward pass."""
    if not torch.is_grad_enabled():
        return shell(*args)
    held: dict[str, Tensor] = {f"block.{name}": p for name, p in shell.block.named_parameters()}
    keeping = partial(create_selective_checkpoint_contexts, kept) if how == "selective" else noop_context_fn

    def run(*given: Any) -> Any:
        return functional_call(shell, held, given)

    return checkpoint(run, *args, use_reentrant=False, context_fn=keeping)


def kept(context: Any, op: Any, *args: Any, **given: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

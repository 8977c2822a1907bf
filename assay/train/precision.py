"""Which precision the products run in, and how: bfloat16 copies of float32 weights."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.func import functional_call

from assay.model.lm import LM, Output
from assay.ops.heap import keep_freed
from assay.ops.precision import multiplies_bfloat16
from assay.ops.step import Step
from assay.parts.heads.lm import LossOptions
from assay.train.recipe import Recipe


@cache
def native_bfloat16(kind: str) -> bool:
    """Whether a device of this kind (cpu, cuda, mps) multiplies bfloat16 faster than float32."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and multiplies_bfloat16()


def resolve(recipe: Recipe, device: torch.device | str) -> Recipe:
    """The recipe with `precision: auto` decided for this device."""
    if recipe.precision != "auto":
        return recipe
    native = native_bfloat16(torch.device(device).type)
    return recipe.model_copy(update={"precision": "bfloat16" if native else "float32"})


class Runner:
    """Calls a model in a precision. In bfloat16 the weights are cast anew at each call, so that their gradients arrive
    at the float32 originals, where the optimiser works."""

    def __init__(self, model: LM, precision: str, compiled: bool = False) -> None:
        self.model = model
        if next(model.parameters()).device.type == "cpu":
            keep_freed()
        call = self._low if precision == "bfloat16" else model
        self._call = torch.compile(call, dynamic=False) if compiled else call

    def __call__(self, step: Step, targets: Tensor | None = None, options: LossOptions | None = None) -> Output:
        return self._call(step, targets=targets, options=options)

    def _low(self, step: Step, **given: Tensor | LossOptions | None) -> Output:
        cast = {name: p.to(torch.bfloat16) for name, p in self.model.named_parameters()}
        return functional_call(self.model, cast, (step,), given)

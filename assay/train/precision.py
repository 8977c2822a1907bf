"""Which precision the products run in, and how: bfloat16 copies of float32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    """Calls a model in a precision. In bfloat16 the weights are cast at each call, so that their gradients arrive at
    the float32 originals, where the optimiser works."""

    def __init__(self, model: LM, precision: str, compiled: bool = False) -> None:
        self.model = model
        if next(model.parameters()).device.type == "cpu":
            keep_freed()
        low = precision == "bfloat16"
        call = self._low if low else model
        self._call = torch.compile(call, dynamic=False) if compiled else call
        self._keeps, self._copies = low and not compiled, dict[str, Tensor]()

    def __call__(self, step: Step, targets: Tensor | None = None, options: LossOptions | None = None) -> Output:
        return self._call(step, targets=targets, options=options)

    @contextmanager
    def cast_once(self) -> Iterator[None]:
        """Calls within share the copies of the first one: those whose backward passes are still to come would keep one
        set each. Weights must not change within."""
        self._copies = self._cast() if self._keeps else {}
        try:
            yield
        finally:
            self._copies = {}

    def _cast(self) -> dict[str, Tensor]:
        return {name: p.to(torch.bfloat16) for name, p in self.model.named_parameters()}

    def _low(self, step: Step, **given: Tensor | LossOptions | None) -> Output:
        return functional_call(self.model, self._copies or self._cast(), (step,), given)

"""Steps whose results do not depend on their company: how many tokens may be computed together for that, and the cut.

In half precision a sum made in another order is another number, and a likeliest token may be another one. Under
`torch.use_deterministic_algorithms` the engine therefore computes as many tokens at once as its parts prove to keep
apart: 32 where a row of every sum is made by a compiled kernel, else one, whose shapes are always the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from assay.model.lm import LM
from assay.ops.native import kernels
from assay.parts.base import Part

if TYPE_CHECKING:
    from assay.engine.runner import Work

TOGETHER = 32


def width(model: LM) -> int | None:
    """Tokens of a call whose rows keep their bits; None: any number, since nothing was promised (no deterministic
    algorithms, or sums of 24 bits and more)."""
    # Float32 is promised to be the same with any number of threads, not in any company: `ops.linear` cuts its products,
    # and a step stays whole. In half precision that would not do: other parts than products look at their company too.
    weight = next(model.parameters())
    if not torch.are_deterministic_algorithms_enabled() or weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    compiled = weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and kernels() is not None
    return TOGETHER if compiled and not mingled(model) else 1


def mingled(model: LM) -> dict[str, str]:
    """The parts whose bits may depend on what is computed beside them, and why."""
    if model.encoder is not None:
        return {"encoder": "it reads a source at once"}
    found = ((m.name, m.mingles()) for m in model.modules() if isinstance(m, Part))
    return {name: reason for name, reason in found if reason is not None}


def calls(work: Sequence[Work], width: int) -> Iterator[list[Work]]:
    """The same tokens in calls of at most `width`, in their order; of what is cut, the last piece emits."""
    call: list[Work] = []
    room = width
    for one in work:
        ids = one.ids
        while ids:
            take, ids = ids[:room], ids[room:]
            call.append(replace(one, ids=take, emit=one.emit and not ids))
            room -= len(take)
            if not room:
                yield call
                call, room = [], width
    if call:
        yield call

"""Whether a model's layers can have the backends of attention that an engine is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from assay.cache import Size
from assay.engine.config import Attention, source_limit
from assay.engine.runner import Runner, Work
from assay.model.lm import LM
from assay.ops.attend import Plan

PROMPT = 3  # tokens of a prompt that is read to find out


def check(attention: Attention, model: LM) -> None:
    """ValueError where a layer refuses its backend, where no layer has a choice of them, and under deterministic
    algorithms, which have a way of their own. Reads a few tokens to find out."""
    wanted = {side: name for side, name in attention.model_dump().items() if name != "auto"}
    if not wanted:
        return
    if torch.are_deterministic_algorithms_enabled():
        side, name = next(iter(wanted.items()))
        raise ValueError(f"attention.{side}: {name!r}; accepted with deterministic algorithms: auto")
    source = source_limit(model.spec)
    probe = Runner(model, size(source), attention=attention)
    slot = probe.open(PROMPT + 1, (0,) if source else ())
    for side, ids in (("prefill", [0] * PROMPT), ("decode", [0])):
        try:
            used = {made.backend for made in plans(tables(probe, Work(slot, ids)))}
        except ValueError as error:
            raise ValueError(f"attention.{side}: {error}") from None
        if side in wanted and wanted[side] not in used:
            raise ValueError(f"attention.{side}: {wanted[side]!r}; no layer of this model has a choice; accepted: auto")


def size(source: int) -> Size:
    """Of the cache that a probe needs."""
    return Size(1, PROMPT + 1, PROMPT, source)


@torch.inference_mode()
def tables(probe: Runner, work: Work) -> Any:
    """What the parts prepared for a step, which has run."""
    step = probe.grid([work])
    states = probe.cache.begin([work.slot], step)
    step = probe.model.prepared(step, states, {})
    probe.model.stacked(step, states, {})
    probe.sources.clear()
    return dict(step.tables)


def plans(value: Any) -> Iterator[Plan]:
    """All plans of attention in the tables that parts prepared."""
    if isinstance(value, Plan):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from plans(one)
    elif isinstance(value, tuple):
        for one in value:
            yield from plans(one)

"""What a normalisation costs: parts beside torch's own functions and beside the formulas written out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.measure.machine import seconds as once
from assay.measure.subject import Subject
from assay.model.init import initialise
from assay.spec import registry
from assay.spec.base import Site

ALONE = True
BASE = "layernorm"
ROUNDS, WARM = 5, 2
EPS = 1e-5


@dataclass(frozen=True)
class Norm:
    """[N, D] -> [N, D], and the weights that it trains."""

    run: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]


def measure(
    subject: Subject,
    *,
    kinds: Sequence[str] = (BASE, "rmsnorm"),
    tokens: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    seconds: float = 1.0,
) -> list[dict[str, Any]]:
    """Rows: kind, tokens, width, forward_s, backward_s, ratio, forward_ratio.

    `kinds` are parts with their default fields; beside them stand `torch.*`, torch's own functions, and `eager.*`, the
    formulas written out and differentiated by autograd: there less arithmetic is less time, as where Zhang and Sennrich
    2019 (arXiv 1910.07467) measured. ratio: forward and backward over those of the part `layernorm`; forward_ratio:
    forward over forward. `tokens`: at once; null: a step of the recipe. `widths`: null: the model's. In the dtype of
    the model's weights, the same input again and again. `seconds` is for all rows.
    """
    dtype = next(subject.model.parameters()).dtype
    sizes = [(n, d) for n in tokens or [subject.recipe.batch.tokens] for d in widths or [subject.spec.d_model]]
    if any(min(size) < 1 for size in sizes):
        raise ValueError(f"norms: tokens: {tokens}, widths: {widths}; accepted: lists of numbers from 1 on")
    rows = []
    for count, width in sizes:
        x, upstream = (torch.randn(count, width, dtype=dtype, device=subject.device) for _ in range(2))
        norms = parts((BASE, *kinds), x) | functions(x)
        times = timed(norms, x, upstream, seconds / len(sizes))
        rows += [
            {"kind": kind, "tokens": count, "width": width, "forward_s": forward, "backward_s": backward}
            | {"ratio": (forward + backward) / sum(times[BASE]), "forward_ratio": forward / times[BASE][0]}
            for kind, (forward, backward) in times.items()
        ]
    return rows


def parts(kinds: Sequence[str], x: Tensor) -> dict[str, Norm]:
    """The parts of these kinds for x [N, D]. ValueError for a kind that is no norm."""
    site, made = Site("norm", d_in=x.shape[1], d_out=x.shape[1]), {}
    for kind in kinds:
        spec = registry.get("norms", kind)()
        part = spec.build(site)
        initialise(part, spec.weights(site), 0)
        part.to(x.device, x.dtype)
        made[kind] = Norm(part, tuple(w for w in part.parameters() if w.requires_grad))
    return made


def functions(x: Tensor) -> dict[str, Norm]:
    """torch's functions and the formulas, for x [N, D]."""
    size = x.shape[1:]
    w = torch.ones(size, dtype=x.dtype, device=x.device, requires_grad=True)
    b = torch.zeros(size, dtype=x.dtype, device=x.device, requires_grad=True)
    return {
        "torch.layer_norm": Norm(lambda x: F.layer_norm(x, size, w, b, EPS), (w, b)),
        "torch.rms_norm": Norm(lambda x: F.rms_norm(x, size, w, EPS), (w,)),
        "eager.layer_norm": Norm(lambda x: scaled(x - x.mean(-1, keepdim=True)) * w + b, (w, b)),
        "eager.rms_norm": Norm(lambda x: scaled(x) * w, (w,)),
    }


def scaled(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def timed(norms: Mapping[str, Norm], x: Tensor, upstream: Tensor, budget_s: float) -> dict[str, tuple[float, float]]:
    """Medians of the seconds of forward, with all that backward needs kept, and of backward.

    Of rounds in which every norm runs once, so that a busy machine slows all alike, each round beginning with another:
    five, and more while the budget lasts; two more before them are not counted.
    """
    x = x.detach().requires_grad_()
    kinds = tuple(norms)
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    start, rounds = time.perf_counter(), 0
    while rounds < WARM + ROUNDS or time.perf_counter() - start < budget_s:
        for kind in (*kinds[rounds % len(kinds) :], *kinds[: rounds % len(kinds)]):
            found[kind].append(both(norms[kind], x, upstream))
        rounds += 1
    kept = {kind: zip(*times[WARM:], strict=True) for kind, times in found.items()}
    return {kind: (statistics.median(a), statistics.median(b)) for kind, (a, b) in kept.items()}


def both(norm: Norm, x: Tensor, upstream: Tensor) -> tuple[float, float]:
    """Seconds of forward and of backward, once."""
    out: list[Tensor] = []
    forward = once(lambda: out.append(norm.run(x)), x.device)
    return forward, once(lambda: torch.autograd.grad(out, (x, *norm.weights), upstream), x.device)

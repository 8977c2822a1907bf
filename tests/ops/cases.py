"""Attention problems for the tests: any mask, head grouping, bias, soft cap and sink, as `attend` receives them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from assay.ops.attend import Plan, Scores, attend, plan
from assay.ops.sees import Sees
from assay.ops.step import Layout, Step, View, rows_step

RULES = (
    Sees(),
    Sees(causal=False),
    Sees(window=3),
    Sees(window=2, first=2),
    Sees(chunk=4),
    Sees(causal=False, band=(2, 1)),
    Sees(window=5, chunk=7),
    Sees(prefix=True),
)


class Slopes:
    """A bias by distance with a parameter a head, like ALiBi's."""

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    def tile(self, scores: Tensor, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        distance = q_pos[..., :, None] - k_pos[..., None, :]
        return scores - self.slopes.to(scores.dtype)[:, None, None] * distance.abs()


class Line(Slopes):
    """The same bias, saying that it depends on distance alone."""

    def by_distance(self, distance: Tensor) -> Tensor:
        return -self.slopes.view(-1, *[1] * distance.ndim) * distance.abs()


@dataclass
class Problem:
    q: Tensor  # [N, H, K]
    k: Tensor  # [R, S, G, K]
    v: Tensor  # [R, S, G, V]
    step: Step
    layout: Layout
    sees: Sees
    scores: Scores

    @property
    def view(self) -> View:
        return View({"k": self.k, "v": self.v}, self.layout)

    def plan(self, backend: str) -> Plan:
        return plan(self.step, self.layout, self.sees, backend)

    def run(self, backend: str) -> Tensor:
        return attend(self.q, self.view, self.step, self.sees, self.scores, self.plan(backend))

    def leaves(self) -> list[Tensor]:
        """q, k, v, and the sink's and the bias's parameters, made leaves that want gradients."""
        slopes = [self.scores.bias.slopes] if isinstance(self.scores.bias, Slopes) else []
        sink = [self.scores.sink] if self.scores.sink is not None else []
        return [t.requires_grad_() for t in (self.q, self.k, self.v, *sink, *slopes)]

    def gradients(self, backend: str, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = self.leaves()
        made = torch.autograd.grad((self.run(backend) * upstream).sum(), leaves, allow_unused=True)
        return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(made, leaves))

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


def problem(
    rows: int = 2,
    tokens: int = 7,
    past: int = 0,
    heads: int = 4,
    groups: int = 2,
    size: int = 3,
    seed: int = 0,
    **more: Any,
) -> Problem:
    """One sequence a row. more: sees, and the fields of Scores; `packed`: documents that share a row; `flat`: the view
    as one row for all, not aligned; `width`: the size of a value; `blank`: so many entries are empty, and a query;
    `prefix`: its length (half of the entries), and one more in the second of two packed documents."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    step = rows_step(torch.zeros(rows, tokens, dtype=torch.long), past)
    entries = past + tokens
    seq, index = torch.arange(rows)[:, None].expand(rows, entries), torch.arange(entries).expand(rows, entries)
    if more.pop("packed", False):
        cut = tokens // 2 + torch.arange(rows)[:, None] % 2
        seq = 2 * seq + (index >= cut)
        index = torch.where(index >= cut, index - cut, index)
        step = step.with_(seq=seq.reshape(-1), index=index.reshape(-1), positions=index.reshape(-1))
    second = step.seq % 2 if int(step.seq.max()) >= rows else torch.zeros_like(step.seq)
    step = step.with_(prefix=more.pop("prefix", entries // 2) + second)
    blank = more.pop("blank", 0)
    if blank:
        seq = torch.where(torch.arange(entries) < blank, torch.full_like(seq, -1), seq)
        step = step.with_(seq=torch.where(torch.arange(rows * tokens) == 1, -1, step.seq))
    shape = (rows, entries)
    layout = Layout(seq.contiguous(), index.contiguous(), index.contiguous(), not more.pop("flat", False))
    width = more.pop("width", size)
    q, k, v = normal(rows * tokens, heads, size), normal(*shape, groups, size), normal(*shape, groups, width)
    sees = more.pop("sees", Sees())
    if more.pop("with_sink", False):
        more["sink"] = normal(heads)
    if (kind := more.pop("with_bias", None)) is not None:
        more["bias"] = kind(normal(heads).abs())
    return Problem(q, k, v, step, layout, sees, Scores(**({"scale": size**-0.5} | more)))


@st.composite
def problems(draw: st.DrawFn, **fixed: Any) -> Problem:
    groups = draw(st.integers(1, 2))
    packed = draw(st.booleans())
    options: dict[str, Any] = {
        "rows": draw(st.integers(1, 3)),
        "tokens": draw(st.integers(1, 9)),
        "past": 0 if packed else draw(st.sampled_from((0, 0, 3, 6))),
        "heads": groups * draw(st.integers(1, 3)),
        "groups": groups,
        "size": draw(st.integers(1, 4)),
        "width": draw(st.integers(1, 4)),
        "sees": draw(st.sampled_from(RULES)),
        "prefix": draw(st.integers(0, 10)),
        "packed": packed,
        "flat": draw(st.booleans()),
        "blank": draw(st.sampled_from((0, 0, 2))),
        "softcap": draw(st.sampled_from((None, None, 1.5))),
        "with_sink": draw(st.booleans()),
        "with_bias": draw(st.sampled_from((None, Slopes, Line))),
        "seed": draw(st.integers(0, 99)),
    }
    return problem(**(options | fixed))

"""TransMamba: attention up to a place in the sequence, a state space behind it, with the same keys, queries and values.

Legend: N tokens, L lanes of T places, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops import attend
from assay.ops.here import Here
from assay.ops.lanes import Lanes, lanes
from assay.ops.scan import decayed
from assay.ops.sees import Sees
from assay.ops.state import State
from assay.ops.step import Step
from assay.parts._checks import halved, token_by_token, whole_heads
from assay.parts.base import Placed
from assay.parts.mixers.mamba2 import TimeStep
from assay.spec.base import Cost, Fan, Init, MixerSpec, NormSpec, PartSpec, PositionSpec, Site, StateField, Weight

CAUSAL = Sees()


class TransMamba(MixerSpec):
    """Attention before the token `switch` and the state of Mamba-2 from there on, by the same queries, keys and values.

    o_t = softmax(q_t k_j / sqrt(K)) v_j over j <= t where t < switch, and else norm(q_t S_t + D v_t), with
    S_t = exp(dt_t A) S_(t-1) + k_t (dt_t v_t)^T, dt = softplus(x W + b), A = -exp(A_log).

    Li et al. 2025, arXiv 2503.24067: one map each for Q and C, for K and B, and for V and x; tokens before the `switch`
    (their TransPoint) attend, later ones read a state as in Mamba-2. S is written from the first token on: at the
    switch it is what their memory converter makes of the keys and values, and nothing is lost. Their schedule of
    switches over the layers is a `pattern` of blocks. Not theirs, or not said: no convolution (a block may have one
    before any mixer), and `norm`, for each head, stands behind the state space alone.

    Keys and values are remembered for the last `switch` tokens, which are all that any token attends to while it does.
    position: of the attention; the state is read by keys and queries that are not turned. dt: as in Mamba-2.
    chunk: tokens that are computed at once; it changes speed and not results.
    """

    kind: Literal["transmamba"] = "transmamba"
    heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    switch: int = Field(default=1024, ge=1)
    position: str | None = None
    dt: TimeStep = TimeStep()
    norm: NormSpec = Field(default="rmsnorm", validate_default=True)
    chunk: int = Field(default=decayed.CHUNK, ge=1)

    @property
    def near(self) -> Sees:
        """Up to the switch all that is before a token."""
        return Sees(window=self.switch)

    def size(self, site: Site) -> int:
        return self.head_dim if self.head_dim is not None else site.d_in // self.heads

    def refusals(self) -> Mapping[str, str]:
        return halved(self.heads, f"{self.heads} heads are")

    def check(self, site: Site) -> None:
        whole_heads(self.heads, self.head_dim, site)
        token_by_token("norm", self.norm)

    def meets(self, scheme: PositionSpec, site: Site) -> None:
        scheme.fits(self.heads, self.size(site))
        if scheme.reads:
            raise ValueError("transmamba needs a scheme with `turns: write`: this one turns keys when they are read")

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.heads}

    def linears(self, site: Site) -> dict[str, Fan]:
        wide = self.heads * self.size(site)
        table = {name: Fan(site.d_in, wide, split=0) for name in ("q", "k", "v")}
        return table | {"dt": Fan(site.d_in, self.heads, split=0), "out": Fan(wide, site.d_out, out=True, split=1)}

    def own(self, site: Site) -> dict[str, Weight]:
        h = (self.heads,)
        steps = Init.between(self.dt.low, self.dt.high, link="softplus", log=True)
        return {
            "A_log": Weight(h, "vector", Init.between(1.0, 16.0, link="log"), split=0),
            "D": Weight(h, "vector", Init.constant(1.0), split=0),
            "dt_bias": Weight(h, "vector", steps, split=0),
        }

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        k = self.size(site)
        return {"norm": (self.norm, site.child("norm", k, k))}

    def state(self, site: Site) -> tuple[StateField, ...]:
        k = self.size(site)
        pairs = tuple(StateField(n, "token", (self.heads, k), split=0, keep=self.switch) for n in ("k", "v"))
        return (*pairs, StateField("s", "sequence", (self.heads, k, k), "float32", split=0))

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """4 * heads * head_dim for each pair before the switch; 2 * heads * head_dim^2 to write a token into the state,
        and as much to read it from the switch on. Executed: both for every token, the attention in its window."""
        k, early = self.size(site), max(0, min(self.switch, seen + new) - seen)
        scan = decayed.cost(new, self.heads, (k, k), self.heads, self.chunk).executed
        pairs, multiplied = CAUSAL.pairs(early, seen), attend.executed_pairs(new, seen, self.near)
        needed = 4 * self.heads * k * pairs + 2 * self.heads * k * k * (2 * new - early)
        return Cost(needed, 4 * self.heads * k * multiplied + scan)

    def build(self, site: Site) -> TransMambaMixer:
        return TransMambaMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=2, head_dim=6, switch=5, chunk=4)
        limits = TimeStep(at_least=0.3, at_most=0.9)
        yield cls.model_validate({"heads": 4, "switch": 2, "norm": "layernorm", "dt": limits, "chunk": 8})
        yield cls(heads=3, head_dim=4, switch=64, chunk=6)


class Table(NamedTuple):
    """What depends on the step alone."""

    plan: attend.Plan
    lanes: Lanes


class TransMambaMixer(Placed):
    """[N, D] -> [N, D]. Head counts are read from the tensors, so a shard of the heads runs the same lines."""

    def __init__(self, spec: TransMamba, site: Site) -> None:
        super().__init__(spec, site)
        self.near = spec.near  # made once: nothing that is traced can make a spec

    def prepare_key(self) -> object:
        return ("transmamba", self.spec.switch)

    def prepare(self, step: Step, state: State | None) -> Table:
        assert state is not None
        self.check_bound()
        return Table(attend.plan(step, state.layout(step), self.near), lanes(step, state.keeps))

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        size = self.spec.size(self.site)
        q, k, v = (m(x, step).unflatten(-1, (-1, size)) for m in (self.q, self.k, self.v))
        q, k = here.tap("q", q), here.tap("k", k)
        early, late = self.attended(q, k, v, step, here), self.recalled(x, (q, k, v), step, here)
        mix = torch.where((step.index < self.spec.switch)[:, None, None], early, late.to(early.dtype))
        return self.out(here.tap("mix", mix).flatten(1), step)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, step: Step, here: Here) -> Float[Tensor, "N H K"]:
        scores = attend.Scores(q.shape[-1] ** -0.5, bias=self.scheme[0].bias() if self.scheme else None)
        q, k = self.scheme[0].on_qk(q, k, step) if self.scheme else (q, k)
        view = here.state.append(step, k=k, v=v)
        return attend.attend(q, view, step, self.near, scores, step.table(self).plan, here)

    def recalled(self, x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], step: Step, here: Here) -> Float[Tensor, "N H K"]:
        rule, where = self.spec.dt, step.table(self).lanes
        q, k, v = (where.lay(t) for t in qkv)
        made = decayed.steps(self.dt(x, step), self.dt_bias, self.A_log, rule.at_least, rule.at_most)
        dt, decay = (where.lay(t) for t in made)  # 0 where a place holds nothing: nothing decays, nothing is written
        past = where.stored(here.state.load("s", step))
        given = decayed.StateSpace(q, k, v, dt, decay, self.D)
        y, end = decayed.state_space(given, past, where, self.spec.chunk)
        if end is not None:
            here.state.store(step, s=where.ends(end, step))
        normed: Tensor = self.norm(where.flat(y))
        return normed


def reference(spec: TransMamba, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64 for one sequence without a position scheme: one token and one head at a time."""
    d = spec.head_dim if spec.head_dim is not None else x.shape[1] // spec.heads
    norm: Any = spec.norm
    q, k, v = (x @ weights[f"{name}.weight"].T for name in ("q", "k", "v"))
    state = [torch.zeros(d, d, dtype=x.dtype) for _ in range(spec.heads)]
    rows = []
    for t, row in enumerate(x):
        dt = torch.log(1 + torch.exp(weights["dt.weight"] @ row + weights["dt_bias"]))
        dt = torch.clamp(dt, spec.dt.at_least, spec.dt.at_most)
        heads = []
        for h in range(spec.heads):
            own = slice(h * d, (h + 1) * d)
            keep = torch.exp(-dt[h] * torch.exp(weights["A_log"][h]))
            state[h] = keep * state[h] + torch.outer(k[t, own], dt[h] * v[t, own])
            if t < spec.switch:
                e = [torch.exp(q[t, own] @ k[j, own] / d**0.5) for j in range(t + 1)]
                heads.append(torch.stack([w / sum(e) * v[j, own] for j, w in enumerate(e)]).sum(0))
                continue
            o = q[t, own] @ state[h] + weights["D"][h] * v[t, own]
            o = o - o.mean() if norm.kind_name() == "layernorm" else o
            o = o / ((o * o).mean() + norm.eps) ** 0.5 * weights["norm.weight"]
            heads.append(o + weights.get("norm.bias", torch.zeros_like(o)))
        rows.append(weights["out.weight"] @ torch.cat(heads))
    return torch.stack(rows)

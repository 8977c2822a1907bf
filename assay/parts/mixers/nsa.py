"""Native sparse attention: a coarse look at everything, a fine look at what it found, and a window.

Legend: N tokens, R x T rows and columns of the grid, S entries of the view, C compressed blocks, B selected blocks,
H query heads, G key heads, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from assay.ops import attend as ops
from assay.ops.here import Here
from assay.ops.sees import Sees
from assay.ops.state import State
from assay.ops.step import Layout, Step, View
from assay.parts._checks import halved, whole_heads
from assay.parts.base import Placed, Position
from assay.spec.base import Cost, Fan, MixerSpec, PositionSpec, Site, Spec, StateField, Weight

CAUSAL = Sees()
BRANCHES = ("compress", "select", "window")


class Compress(Spec):
    """Blocks of `size` tokens, one beginning at every `stride`-th: each becomes one key and one value by a map of its
    own, out(silu(in([k_1 + e_1, ..., k_size + e_size]))), with `e` learned and `hidden` numbers between the two (null:
    head_dim). The paper says that it is an MLP, and neither its width nor its activation."""

    size: int = Field(default=32, ge=1)
    stride: int = Field(default=16, ge=1)
    hidden: int | None = Field(default=None, ge=1)


class Nsa(MixerSpec):
    """Native sparse attention. Yuan et al. 2025, arXiv 2502.11089.

    Three attentions with keys and values of their own, summed with sigmoid gates that each head has from the layer's
    input (equation 5): over compressed blocks that lie behind the query (equation 7), over the tokens of `keep`
    selected blocks of `size` tokens (equations 8 to 12), and over a `window` (section 3.3.3). A selected block is
    worth what the probabilities of the first attention give to the compressed blocks that it overlaps, as often as it
    does in steps of `stride`, summed over the query heads of a group, which all select the same. Among the `keep` are
    always the `initial` first blocks and the last `local` ones, of which the query's own is one. Of equal blocks the
    earlier is selected; the selection has no gradient. Keys are turned before they are compressed.

    Compressed blocks are made again from the stored keys and values in each step, and keys of the window are stored
    for as long as the others: a cache with entries for blocks would need neither.
    """

    kind: Literal["nsa"] = "nsa"
    heads: int = Field(ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    position: str | None = None
    compress: Compress = Compress()
    size: int = Field(default=64, ge=1)
    keep: int = Field(default=16, ge=1)
    initial: int = Field(default=1, ge=0)
    local: int = Field(default=2, ge=1)
    window: int = Field(default=512, ge=1)

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def blocks(self) -> ops.Blocks:
        """How many are looked into; what they are worth is not its matter."""
        return ops.Blocks(size=self.size, keep=self.keep)

    def dim(self, site: Site) -> int:
        return self.head_dim if self.head_dim is not None else site.d_in // self.heads

    def hidden(self, site: Site) -> int:
        return self.dim(site) if self.compress.hidden is None else self.compress.hidden

    def refusals(self) -> Mapping[str, str]:
        return halved(self.groups, f"{self.groups} key heads are")

    def check(self, site: Site) -> None:
        if self.heads % self.groups:
            raise ValueError(f"`heads` ({self.heads}) is not a multiple of `kv_heads` ({self.groups})")
        whole_heads(self.heads, self.head_dim, site)
        length, stride = self.compress.size, self.compress.stride
        if length % stride or self.size % stride or length > self.size:
            raise ValueError(
                f"`compress`: size {length}, stride {stride}; accepted: a stride that divides its size and `size`, "
                f"and a size of at most {self.size}"
            )
        if self.initial + self.local > self.keep:
            raise ValueError(f"`initial` + `local` ({self.initial + self.local}) is more than `keep` ({self.keep})")

    def meets(self, scheme: PositionSpec, site: Site) -> None:
        scheme.fits(self.heads, self.dim(site))
        if scheme.reads:
            raise ValueError("nsa needs a scheme with `turns: write`: this one turns keys when they are read")

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.groups}

    def linears(self, site: Site) -> dict[str, Fan]:
        k = self.dim(site)
        hidden = self.hidden(site)
        table = {"q": Fan(site.d_in, self.heads * k, split=0)}
        table |= {f"{kv}_{name}": Fan(site.d_in, self.groups * k, split=0) for name in BRANCHES for kv in "kv"}
        for kv in "kv":
            table |= {f"{kv}_in": Fan(self.compress.size * k, hidden), f"{kv}_out": Fan(hidden, k)}
        table["gate"] = Fan(site.d_in, 3 * self.heads, split=0)
        return table | {"out": Fan(self.heads * k, site.d_out, out=True, split=1)}

    def own(self, site: Site) -> dict[str, Weight]:
        return {f"{kv}_place": Weight((self.compress.size, self.dim(site)), "vector") for kv in "kv"}

    def state(self, site: Site) -> tuple[StateField, ...]:
        shape = (self.groups, self.dim(site))
        return tuple(StateField(f"{kv}_{name}", "token", shape, split=0) for name in BRANCHES for kv in "kv")

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """4 * heads * head_dim for each pair of a query with a compressed block, with a token of a selected block (all
        that may be selected are full), and with one of the window. The maps that compress count for each block and key
        head, less what they count as maps of tokens, so this may be below 0. Executed: all blocks of the view, the
        square of what is selected (of a large one the selected blocks and the squares of the queries' own), and the
        sums over compressed blocks as a product with their overlaps."""
        k, rule, length, near = self.dim(site), self.compress, new + seen, Sees(window=self.window)
        each, maps = 4 * self.heads * k, 4 * self.hidden(site) * k * (rule.size + 1)
        behind = [max(0, (ends - rule.size) // rule.stride + 1) for ends in range(seen, length + 1)]
        made, count = behind[-1] - behind[0], length // rule.stride if length >= rule.size else 0
        pairs = sum(behind[1:]) + self.blocks.pairs(new, seen) + near.pairs(new, seen)
        square, sums = ops.executed_pairs(new, seen, CAUSAL), 0
        if self.blocks.narrows(length):
            square, sums = self.blocks.multiplied(new, seen), 2 * self.groups * new * count * (length // self.size)
        executed = new * count + square + ops.executed_pairs(new, seen, near)
        return Cost(
            each * pairs + maps * (self.groups * made - new),
            each * executed + maps * (self.groups * count - new) + sums,
        )

    def build(self, site: Site) -> NsaMixer:
        return NsaMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        small = Compress(size=2, stride=1, hidden=5)
        yield cls(heads=4, kv_heads=2, head_dim=6, compress=small, size=2, keep=3, initial=0, local=1, window=3)
        wide = Compress(size=4, stride=2)
        yield cls(heads=4, kv_heads=1, compress=wide, size=4, keep=2, initial=0, local=1, window=2)
        yield cls(heads=2, compress=Compress(size=2, stride=2), size=2, keep=4, initial=1, local=2, window=4)


class NsaMixer(Placed):
    """[N, D] -> [N, D]. Head counts are read from the tensors, so a shard of the heads runs the same lines."""

    def __init__(self, spec: Nsa, site: Site) -> None:
        super().__init__(spec, site)
        self.blocks, self.near = spec.blocks, Sees(window=spec.window)

    @property
    def scheme_dim(self) -> int:
        return int(self.spec.dim(self.site))

    def bind(self, positions: Mapping[str, Position]) -> None:
        super().bind(positions)
        for scheme in self.scheme:
            if scheme.bias() is not None:
                raise ValueError(f"{self.name}: position {self.spec.position!r} adds a bias, and blocks have no place")

    def prepare_key(self) -> object:
        return ("nsa", self.spec.window, self.blocks)

    def prepare(self, step: Step, state: State | None) -> Any:
        """The plans of the tokens that are before a query, and of those in its window."""
        assert state is not None
        self.check_bound()
        layout = state.layout(step)
        before = None if ops.gathers(self.blocks, step, layout) else ops.plan(step, layout, CAUSAL)
        return before, ops.plan(step, layout, self.near)

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        k_dim = self.spec.dim(self.site)
        q = self.q(x, step).unflatten(-1, (-1, k_dim))
        maps = {f"{kv}_{b}": getattr(self, f"{kv}_{b}") for b in BRANCHES for kv in "kv"}
        new = {name: linear(x, step).unflatten(-1, (-1, k_dim)) for name, linear in maps.items()}
        keys = torch.cat([new[f"k_{b}"] for b in BRANCHES], 1)
        q, keys = self.scheme[0].on_qk(q, keys, step) if self.scheme else (q, keys)
        new |= dict(zip((f"k_{b}" for b in BRANCHES), keys.chunk(3, 1), strict=True))
        view = here.state.append(step, **new)
        mix = here.tap("mix", self.mixed(here.tap("q", q), view, torch.sigmoid(self.gate(x, step)), step, here))
        return self.out(mix.flatten(1), step)

    def mixed(
        self, q: Float[Tensor, "N H K"], view: View, gate: Float[Tensor, "N L"], step: Step, here: Here
    ) -> Float[Tensor, "N H K"]:
        """The three attentions, each head's times its gate."""
        before, near = step.table(self)
        coarse, probs = self.coarse(q, view, step)
        if self.blocks.narrows(view.layout.seq.shape[1]):
            found, picked = self.selected(probs, view.layout, step, here)
            before = ops.opened(self.blocks, found, picked, before, step, branch(view, "select"))
        scores = ops.Scores(q.shape[-1] ** -0.5)
        fine = ops.attend(q, branch(view, "select"), step, CAUSAL, scores, before)
        window = ops.attend(q, branch(view, "window"), step, self.near, scores, near)
        gates = gate.unflatten(-1, (-1, 3, 1)).unbind(2)
        return gates[0] * coarse + gates[1] * fine + gates[2] * window

    def coarse(self, q: Tensor, view: View, step: Step) -> tuple[Float[Tensor, "N H K"], Float[Tensor, "R H T C"]]:
        """Attention over compressed blocks, and its probabilities; 0 where none is complete. In float32 or better."""
        q_seq, q_index, _, k_seq, _, _ = ops.aligned(step, view.layout)
        rule, high = self.spec.compress, torch.promote_types(q.dtype, torch.float32)
        found = ops.runs(view.layout, k_seq.shape[0], rule.size, rule.stride)
        k, v = (self.compressed(kv, found, view).to(high) for kv in "kv")
        z = ops.products(q.view(k.shape[0], -1, *q.shape[1:]).to(high), k) * q.shape[-1] ** -0.5
        p = ops.softmax(z.masked_fill(~found.before(q_seq, q_index + 1)[:, None], float("-inf")), None)
        rows, heads, tokens, count = p.shape
        groups = v.shape[2]
        mixed = p.reshape(rows, groups, heads // groups * tokens, count) @ v.transpose(1, 2)
        return mixed.view(rows, heads, tokens, -1).transpose(1, 2).reshape(q.shape).to(q.dtype), p

    def compressed(self, kv: str, found: ops.Runs, view: View) -> Float[Tensor, "R C G K"]:
        """One key or value a block. A block is no token of the step, by whom an adapter would be chosen."""
        rows = found.first.shape[0]
        stored = view.dense(f"{kv}_compress")
        inside = found.of(stored.reshape(rows, -1, *stored.shape[2:])) + getattr(self, f"{kv}_place")[:, None]
        into, out = getattr(self, f"{kv}_in"), getattr(self, f"{kv}_out")
        made: Tensor = out(F.silu(into(inside.transpose(2, 3).flatten(3), None)), None)
        return made

    @torch.no_grad()
    def selected(
        self, probs: Float[Tensor, "R H T C"], layout: Layout, step: Step, here: Here
    ) -> tuple[ops.Runs, Bool[Tensor, "R G T B"]]:
        """The blocks that can be selected, and which of them each group of heads selects beside the query's own."""
        spec, rows = self.spec, probs.shape[0]
        q_seq, q_index, _, _, _, _ = ops.aligned(step, layout)
        small = ops.runs(layout, rows, spec.compress.size, spec.compress.stride)
        blocks = ops.runs(layout, rows, spec.size, spec.size)
        both = torch.minimum(small.last[..., None], blocks.last[:, None])
        both = both - torch.maximum(small.first[..., None], blocks.first[:, None]) + 1
        # Of the steps that a compressed block is long, how many lie in the selected block: so often equation 9 has it.
        times = both.clamp(min=0) // spec.compress.stride * (small.real[..., None] & blocks.real[:, None])
        per_group = probs.unflatten(1, (-1, spec.heads // spec.groups)).sum(2)
        worth = per_group @ times.to(probs.dtype)[:, None]
        own, number = q_index[..., None] // spec.size, blocks.end[:, None] // spec.size
        always = (number < spec.initial) | (number > own - spec.local)
        worth = worth.masked_fill(always[:, None], float("inf"))
        picked = ops.best(worth, blocks.before(q_seq, q_index // spec.size * spec.size), spec.keep - 1)
        return blocks, here.tap("choice", picked)


def branch(view: View, name: str) -> View:
    """The keys and values of one of the three."""
    return View({kv: view.dense(f"{kv}_{name}") for kv in "kv"}, view.layout)


def reference(spec: Nsa, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64 for one sequence without a position scheme: one token and one head at a time."""
    d = spec.head_dim if spec.head_dim is not None else x.shape[1] // spec.heads
    groups = spec.heads if spec.kv_heads is None else spec.kv_heads
    shared, length, stride = spec.heads // groups, spec.compress.size, spec.compress.stride

    def rows(name: str, g: int) -> list[Tensor]:
        return [(weights[f"{name}.weight"] @ row)[g * d : (g + 1) * d] for row in x]

    def compress(kv: str, inside: list[Tensor]) -> Tensor:
        flat = torch.cat([value + weights[f"{kv}_place"][j] for j, value in enumerate(inside)])
        z = weights[f"{kv}_in.weight"] @ flat
        return weights[f"{kv}_out.weight"] @ (z / (1 + torch.exp(-z)))

    def look(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        e = [torch.exp(q @ key / d**0.5) for key in keys]
        p = [w / sum(e) for w in e]
        return torch.stack([w * v for w, v in zip(p, values, strict=True)]).sum(0) if p else torch.zeros_like(q), p

    def select(i: int, probs: list[list[Tensor]]) -> list[int]:
        """The places that a group of query heads of token i selects, from what each gives to compressed blocks."""
        own, worth = i // spec.size, {}
        for b in range(own):
            steps = range(b * spec.size // stride, (b + 1) * spec.size // stride)  # the steps that block b is made of
            inside = [s - n for s in steps for n in range(length // stride)]  # the compressed blocks that each is in
            worth[b] = sum(float(p[c]) for p in probs for c in inside if 0 <= c < len(p))
        always = [b for b in range(own) if b < spec.initial or b > own - spec.local]
        others = sorted((b for b in range(own) if b not in always), key=lambda b: -worth[b])
        picked = [own, *always, *others[: spec.keep - 1 - len(always)]]
        return [j for j in range(i + 1) if j // spec.size in picked]

    names = [f"{kv}_{branch}" for branch in BRANCHES for kv in "kv"]
    stored = [{name: rows(name, g) for name in names} for g in range(groups)]
    out = []
    for i, row in enumerate(x):
        heads, gate = [], 1 / (1 + torch.exp(-(weights["gate.weight"] @ row)))
        starts = [c for c in range(0, x.shape[0], stride) if c + length <= i + 1]
        near = range(max(0, i - spec.window + 1), i + 1)
        for g, kv in enumerate(stored):
            coarse_k, coarse_v = ([compress(n, kv[f"{n}_compress"][c : c + length]) for c in starts] for n in "kv")
            queries = [(weights["q.weight"] @ row)[h * d : (h + 1) * d] for h in range(g * shared, (g + 1) * shared)]
            coarse = [look(q, coarse_k, coarse_v) for q in queries]
            chosen = select(i, [[w.detach() for w in p] for _, p in coarse])
            for n, q in enumerate(queries):
                fine = look(q, [kv["k_select"][j] for j in chosen], [kv["v_select"][j] for j in chosen])[0]
                window = look(q, [kv["k_window"][j] for j in near], [kv["v_window"][j] for j in near])[0]
                a, b, c = gate[3 * (g * shared + n) : 3 * (g * shared + n) + 3]
                heads.append(a * coarse[n][0] + b * fine + c * window)
        out.append(weights["out.weight"] @ torch.cat(heads))
    return torch.stack(out)

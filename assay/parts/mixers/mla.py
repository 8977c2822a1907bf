"""Multi-head latent attention, in the form that suits many new tokens and the one that suits a single one.

Legend: N tokens, R x S entries of the view, H heads, C latent width, E = nope + rope dimensions of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops import attend as ops
from assay.ops.grouped import heads
from assay.ops.here import Here
from assay.ops.sees import Sees
from assay.ops.state import State
from assay.ops.step import InPages, Step, View
from assay.parts._checks import halved, token_by_token
from assay.parts.base import Placed
from assay.parts.linears.dense import together
from assay.parts.norms.rmsnorm import RmsNorm
from assay.parts.selectors import indexer
from assay.parts.selectors.indexer import Indexer
from assay.spec.base import (
    Cost,
    Fan,
    MixerSpec,
    NormSpec,
    PartSpec,
    PositionSpec,
    SelectorSpec,
    Site,
    StateField,
    linear_at,
)

CAUSAL = Sees()


class Mla(MixerSpec):
    """Multi-head latent attention. DeepSeek-AI 2024, arXiv 2405.04434, section 2.1; 2412.19437, section 2.1.1.

    Keys and values of every head are maps of one latent of `kv_rank` numbers a token. Position enters by `rope_dim`
    dimensions of their own: of each query, and of one key that all heads share. The latent and that key are all that
    is remembered. A head's keys have `nope_dim` + `rope_dim` dimensions, its values `value_dim`.

    q_rank: queries come from a latent too; null is a map without one. norm: on both latents, or null. scale: null is
    (nope_dim + rope_dim)^-0.5. position: a scheme of the stack for the `rope_dim` dimensions. bias: of the maps into
    the latents and of the one out.

    Several new tokens: the keys and values of all heads are made from the latents (expanded). One new token a sequence:
    their maps are folded into the query and the mix, and what is attended to is the latent itself (absorbed, section
    2.1.2). Both are the same function.

    select: which keys a token attends to, of those before it; null is all of them.
    """

    kind: Literal["mla"] = "mla"
    heads: int = Field(ge=1)
    kv_rank: int = Field(ge=1)
    q_rank: int | None = Field(default=None, ge=1)
    nope_dim: int = Field(default=128, ge=1)
    rope_dim: int = Field(default=64, ge=1)
    value_dim: int = Field(default=128, ge=1)
    position: str | None = None
    scale: float | None = None
    norm: NormSpec | None = Field(default="rmsnorm", validate_default=True)
    bias: bool = False
    select: SelectorSpec | None = None

    def refusals(self) -> Mapping[str, str]:
        return halved(self.heads, f"{self.heads} heads are")

    def check(self, site: Site) -> None:
        token_by_token("norm", self.norm)

        for child, place in self.children(site).values():
            child.check(place)

    def meets(self, scheme: PositionSpec, site: Site) -> None:
        scheme.fits(self.heads, self.rope_dim)
        if self.select is not None:
            self.select.turns(self.rope_dim)
        if self.select is not None and scheme.reads:
            raise ValueError("`select` needs a scheme with `turns: write`: this one turns keys when they are read")

    def pieces(self, site: Site) -> Mapping[str, int]:
        """A selector chooses by all heads."""
        return {"tensor": self.heads} if self.select is None else {}

    def linears(self, site: Site) -> dict[str, Fan]:
        queries = self.heads * (self.nope_dim + self.rope_dim)
        if self.q_rank is None:
            table = {"q": Fan(site.d_in, queries, split=0)}
        else:
            table = {"q_down": Fan(site.d_in, self.q_rank, self.bias), "q_up": Fan(self.q_rank, queries, split=0)}
        return table | {
            "kv_down": Fan(site.d_in, self.kv_rank + self.rope_dim, self.bias),
            "kv_up": Fan(self.kv_rank, self.heads * (self.nope_dim + self.value_dim), split=0),
            "out": Fan(self.heads * self.value_dim, site.d_out, self.bias, out=True, split=1),
        }

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        widths = {"kv_norm": self.kv_rank} | ({} if self.q_rank is None else {"q_norm": self.q_rank})
        found: dict[str, tuple[PartSpec, Site]] = {}
        if self.norm is not None:
            found = {name: (self.norm, site.child(name, width, width)) for name, width in widths.items()}
        if self.select is not None:
            found["select"] = (self.select, site.child("select", site.d_in, self.q_rank or site.d_in))
        return found

    def state(self, site: Site) -> tuple[StateField, ...]:
        """The normed latent and the shared key (turned, where the scheme turns when it writes) side by side: the keys
        of the absorbed form as they are."""
        kept = (StateField("latent", "token", (self.kv_rank + self.rope_dim,)),)
        return kept if self.select is None else kept + self.select.state(self.children(site)["select"][1])

    def absorbs(self, site: Site) -> bool:
        """Whether one new token is served by the latents: folding needs the matrix of `kv_up`."""
        return linear_at(site, "kv_up").kind_name() == "dense"

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """q k^T and p v for each pair, 2 FLOPs a multiply-add. Of several new tokens, in the expanded form: 2 * heads *
        (nope_dim + rope_dim + value_dim) a pair, and the map `kv_up` again for every entry that was seen before.
        Of one, in the absorbed form: 2 * heads * (2 * kv_rank + rope_dim) a pair; folding costs what `kv_up` does.
        Pairs are those that `select` leaves; executed is the whole square then, since what it hides is masked."""
        absorbed = new == 1 and self.absorbs(site)
        sizes = 2 * self.kv_rank + self.rope_dim if absorbed else self.nope_dim + self.rope_dim + self.value_dim
        again = 0 if absorbed else 2 * seen * self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        pairs, executed = CAUSAL.pairs(new, seen), ops.executed_pairs(new, seen, CAUSAL)
        if self.select is not None and self.select.narrows(new + seen):
            pairs, executed = self.select.pairs(new, seen), new * (new + seen)
        return Cost(2 * self.heads * sizes * pairs + again, 2 * self.heads * sizes * executed + again)

    def build(self, site: Site) -> MlaMixer:
        return MlaMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        sizes: dict[str, Any] = {"heads": 4, "kv_rank": 10, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}
        yield cls(**sizes, q_rank=14)
        yield cls(**sizes, bias=True, scale=0.4)
        yield cls(**sizes, q_rank=9, bias=True, norm=RmsNorm(eps=1e-2))
        yield cls(**{**sizes, "value_dim": 7}, q_rank=8, norm=None)
        yield cls(**sizes, q_rank=14, select=Indexer(heads=3, head_dim=5, keep=4, align=0.5))


@dataclass(frozen=True)
class Asked:
    """The call that a form answers. learn: what a selector makes of the logits, in training."""

    step: Step
    plan: ops.Plan | None
    here: Here
    learn: Callable[[Float[Tensor, "R H T S"]], None] | None = None


class MlaMixer(Placed):
    """[N, D] -> [N, D]. Head counts are read from the tensors, so a shard of the heads runs the same lines."""

    def __init__(self, spec: Mla, site: Site) -> None:
        super().__init__(spec, site)
        self.folds = spec.absorbs(site)

    @property
    def scheme_dim(self) -> int:
        return int(self.spec.rope_dim)

    def prepare_key(self) -> object:
        return ("attend", CAUSAL, None)

    def prepare(self, step: Step, state: State | None) -> Any:
        assert state is not None
        self.check_bound()
        return ops.plan(step, state.layout(step), CAUSAL)

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        spec = self.spec
        q, latent = together(x, step, self.q if spec.q_rank is None else self.q_down, self.kv_down)
        read = x if spec.q_rank is None else self.normed("q_norm", q)
        q = q if spec.q_rank is None else self.q_up(read, step)
        q = q.unflatten(-1, (-1, spec.nope_dim + spec.rope_dim))
        latent, k = latent.split([spec.kv_rank, spec.rope_dim], -1)
        turned, k = self.turned(q[..., spec.nope_dim :], k[:, None], step)
        q = torch.cat([q[..., : spec.nope_dim], turned], -1)
        entry, asked = torch.cat([self.normed("kv_norm", latent), k[:, 0]], -1), Asked(step, step.table(self), here)
        if spec.select is None:
            view = here.state.append(step, latent=entry)
        else:
            given, more = self.select.read(x, read, step, lambda q, k: self.leading(q, k, step))
            view = here.state.append(step, latent=entry, **more)
            trains = self.training and torch.is_grad_enabled()
            learn = partial(self.select.learn, given, view, here=here["select"]) if trains else None
            asked = Asked(step, self.narrowed(asked.plan, given, view, step), here, learn)
        form = self.absorbed if self.folds and step.longest == 1 else self.expanded
        mix = here.tap("mix", form(here.tap("q", q), self.on_read(view, step), asked))
        return self.out(mix.flatten(1), step)

    def normed(self, name: str, latent: Tensor) -> Tensor:
        return latent if self.spec.norm is None else getattr(self, name)(latent)

    def narrowed(self, plan: ops.Plan | None, asked: tuple[Tensor, ...], view: View, step: Step) -> ops.Plan | None:
        """The plan with what the selector leaves; as it is where the view has no more entries than that."""
        if not self.spec.select.narrows(view.layout.seq.shape[1]):
            return plan
        if plan is None or plan.mask is None:
            plan = ops.materialised(step, view.layout, CAUSAL, "auto")
        assert plan.mask is not None
        return ops.narrowed(plan, self.select.choose(asked, view, plan.mask))

    def leading(self, q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The first `rope_dim` dimensions turned as those of the queries are."""
        dim = self.spec.rope_dim
        first, second = self.turned(q[..., :dim], k[..., :dim], step)
        return torch.cat([first, q[..., dim:]], -1), torch.cat([second, k[..., dim:]], -1)

    def turned(self, q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        return self.scheme[0].on_qk(q, k, step) if self.scheme else (q, k)

    def on_read(self, view: View, step: Step) -> View:
        """The view with its shared key turned, where the scheme does that when it is read."""
        if not self.scheme or not self.scheme[0].spec.reads:
            return view
        latent, k = view.dense("latent").split([self.spec.kv_rank, self.spec.rope_dim], -1)
        _, read = self.scheme[0].on_read(k, View({"k": k[:, :, None]}, view.layout), step)
        return View({"latent": torch.cat([latent, read.dense("k")[:, :, 0]], -1)}, view.layout)

    def expanded(self, q: Float[Tensor, "N H E"], view: View, asked: Asked) -> Float[Tensor, "N H V"]:
        """Keys and values of every head, from the latents."""
        spec = self.spec
        latent, shared = view.dense("latent").split([spec.kv_rank, spec.rope_dim], -1)
        # The entries of a view are not the tokens of the step, by whom an adapter would be chosen.
        k, v = (
            self.kv_up(latent, None)
            .unflatten(-1, (-1, spec.nope_dim + spec.value_dim))
            .split([spec.nope_dim, spec.value_dim], -1)
        )
        k = torch.cat([k, shared[:, :, None].expand(-1, -1, k.shape[2], -1)], -1)
        return self.mixed(q, View({"k": k, "v": v}, view.layout), asked)

    def absorbed(self, q: Float[Tensor, "N H E"], view: View, asked: Asked) -> Float[Tensor, "N H V"]:
        """(W_k c) q = c (W_k^T q) and sum p W_v c = W_v sum p c: one key head, whose values are a part of it."""
        spec = self.spec
        up_k, up_v = self.kv_up.weight.unflatten(0, (-1, spec.nope_dim + spec.value_dim)).split(
            [spec.nope_dim, spec.value_dim], 1
        )
        q_nope, q_rope = q.split([spec.nope_dim, spec.rope_dim], -1)
        q = torch.cat([heads(q_nope, up_k.mT), q_rope], -1)
        mix = self.mixed(q, View(self.entries(view), view.layout), asked)
        return heads(mix, up_v)

    def entries(self, view: View) -> Mapping[str, Tensor]:
        """Latents as the keys of one head, and as its values without their end; in pages where they stand in pages."""
        if isinstance(view.fields, InPages):
            pool = view.fields.pools["latent"][:, :, None]
            return InPages({"k": pool, "v": pool[..., : self.spec.kv_rank]}, view.fields.table)
        stored = view.dense("latent")[:, :, None]
        return {"k": stored, "v": stored[..., : self.spec.kv_rank]}

    def rule(self) -> ops.Scores:
        """How q.k becomes a logit."""
        spec = self.spec
        scale = (spec.nope_dim + spec.rope_dim) ** -0.5 if spec.scale is None else spec.scale
        return ops.Scores(scale, bias=self.scheme[0].bias() if self.scheme else None)

    def mixed(self, q: Tensor, view: View, asked: Asked) -> Tensor:
        if asked.learn is not None:
            with torch.no_grad():
                logits = ops.logits(q, view, asked.step, CAUSAL, self.rule(), asked.plan)
            asked.learn(logits)
        return ops.attend(q, view, asked.step, CAUSAL, self.rule(), asked.plan, asked.here)


def reference(spec: Mla, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64 for one sequence without a position scheme: one token and one head at a time, in the expanded
    form of the paper's equations 37 to 47 (2405.04434, appendix C)."""
    nope, rope, values = spec.nope_dim, spec.rope_dim, spec.value_dim
    scale = spec.scale if spec.scale is not None else 1 / (nope + rope) ** 0.5

    def linear(name: str, z: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ z + weights.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))

    def norm(name: str, z: Tensor) -> Tensor:
        if spec.norm is None:
            return z
        return z / ((z * z).mean() + spec.norm.eps) ** 0.5 * weights[f"{name}.weight"]  # type: ignore[attr-defined]

    keys, shared, latents = [], [], []
    for row in x:
        latents.append(row if spec.q_rank is None else norm("q_norm", linear("q_down", row)))
        down = linear("kv_down", row)
        keys.append(linear("kv_up", norm("kv_norm", down[: spec.kv_rank])).view(spec.heads, nope + values))
        shared.append(down[spec.kv_rank :])
    inside = {key.removeprefix("select."): w for key, w in weights.items() if key.startswith("select.")}
    rows = []
    for i, latent in enumerate(latents):
        q = linear("q" if spec.q_rank is None else "q_up", latent).view(spec.heads, nope + rope)
        seen, heads = list(range(i + 1)), []
        if spec.select is not None:
            seen = indexer.reference(spec.select, inside, x, latent, i)  # type: ignore[arg-type]
        for h in range(spec.heads):
            z = [scale * (q[h, :nope] @ keys[j][h, :nope] + q[h, nope:] @ shared[j]) for j in seen]
            e = [value.exp() for value in z]
            heads.append(torch.stack([w / sum(e) * keys[j][h, nope:] for w, j in zip(e, seen, strict=True)]).sum(0))
        rows.append(linear("out", torch.cat(heads)))
    return torch.stack(rows)

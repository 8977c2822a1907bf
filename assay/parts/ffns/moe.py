"""A mixture of gated experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.activations import Activation, activate
from assay.ops.activations import reference as reference_activation
from assay.ops.grouped import grouped
from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts.base import Ffn
from assay.spec.base import FfnSpec, PartSpec, RouterSpec, Site, Weight


class Moe(FfnSpec):
    """sum over the chosen experts of share * down(act(gate x) * up x). Lepikhin et al. 2020, arXiv 2006.16668.

    No token is dropped: tokens are sorted by expert and multiplied in groups (MegaBlocks, arXiv 2211.15841).
    """

    kind: Literal["moe"] = "moe"
    experts: int = Field(ge=1)
    width: int = Field(ge=1)
    act: Activation = "silu"
    router: RouterSpec = Field(default="topk", validate_default=True)
    refuses: ClassVar[Mapping[str, str]] = {
        "split": "experts are cut by dispatching tokens to them, not by summing halves",
        "executed": "the grouped product's FLOPs depend on the routing kernel; the counter has no formula for it",
    }

    @property
    def k(self) -> int:
        return int(self.router.k)  # type: ignore[attr-defined]

    def check(self, site: Site) -> None:
        self.router.check(self.router_site(site))

    def router_site(self, site: Site) -> Site:
        return site.child("router", site.d_in, self.experts)

    def own(self, site: Site) -> dict[str, Weight]:
        into, out = (self.experts, self.width, site.d_in), (self.experts, site.d_out, self.width)
        share, init = self.k / self.experts, site.init
        table = {n: Weight(into, "expert", init.matrix(site.d_in), split=0, active=share) for n in ("gate", "up")}
        return table | {"down": Weight(out, "expert", init.out(self.width, site.layers), split=0, active=share)}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {"router": (self.router, self.router_site(site))}

    def build(self, site: Site) -> MoeFfn:
        return MoeFfn(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(experts=4, width=16)
        yield cls.model_validate({"experts": 3, "width": 5, "act": "gelu", "router": {"kind": "topk", "k": 1}})


class MoeFfn(Ffn):
    """[N, D] -> [N, D]. Experts are [E, F, D] and [E, D, F]; rows are sorted by expert, so no loop and no host sync."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        choice, share = self.router(x, step, here["router"])
        flat = choice.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.zeros(self.spec.experts, dtype=torch.long, device=x.device).index_add(
            0, flat, torch.ones_like(flat)
        )
        token = order // choice.shape[1]
        rows = x.index_select(0, token)
        inner = activate(self.spec.act, grouped(rows, self.gate, counts)) * grouped(rows, self.up, counts)
        out = grouped(inner, self.down, counts) * share.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x).index_add(0, token, out)


def reference(spec: Moe, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: every token and every chosen expert in turn."""
    rows = []
    for row in x:
        raw = (weights["router.map.weight"] @ row).exp()
        shares = raw / raw.sum()
        chosen = sorted(range(spec.experts), key=lambda e: (-shares[e].item(), e))[: spec.k]
        total = sum(shares[e] for e in chosen) if spec.router.renormalise else 1.0  # type: ignore[attr-defined]
        y = torch.zeros_like(row)
        for e in chosen:
            inner = reference_activation(spec.act, weights["gate"][e] @ row) * (weights["up"][e] @ row)
            y = y + shares[e] / total * (weights["down"][e] @ inner)
        rows.append(y)
    return torch.stack(rows)

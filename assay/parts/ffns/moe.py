"""A mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from assay.ops.activations import Activation, activate, glu
from assay.ops.activations import reference as reference_activation
from assay.ops.grouped import chosen, grouped
from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts._checks import token_by_token
from assay.parts.base import Ffn
from assay.parts.ffns import dense, gated
from assay.parts.routers import topk
from assay.spec.base import Fan, FfnSpec, Init, NormSpec, PartSpec, RouterSpec, Site, Spec, Weight


class Clamp(Spec):
    """(clip(up) + 1) * g * sigmoid(alpha g), g = min(gate, limit), up clipped to +-limit. gpt-oss, arXiv 2508.10925."""

    limit: float = Field(default=7.0, gt=0.0)
    alpha: float = 1.702


class Moe(FfnSpec):
    """sum over the chosen experts of share * down(act(gate x) * up x). Lepikhin et al. 2020, arXiv 2006.16668.

    No token is dropped: tokens are sorted by expert and multiplied in groups (MegaBlocks, arXiv 2211.15841).
    gated: without it an expert is down(act(up x)). shared: a network that every token passes beside the routed ones
    (DeepSeekMoE, arXiv 2401.06066). input_scaled: the share multiplies an expert's input and not its output (Llama 4).
    norm: of what the routed experts read, not the router. latent: they work at this width, between two maps of their
    own that all of them share (Nemotron 3).
    """

    kind: Literal["moe"] = "moe"
    experts: int = Field(ge=1)
    width: int = Field(ge=1)
    act: Activation = "silu"
    gated: bool = True
    bias: bool = False
    clamp: Clamp | None = None
    router: RouterSpec = Field(default="topk", validate_default=True)
    shared: FfnSpec | None = None
    input_scaled: bool = False
    norm: NormSpec | None = None
    latent: int | None = Field(default=None, ge=1)
    refuses: ClassVar[Mapping[str, str]] = {
        "split": "experts are cut by dispatching tokens to them, not by summing halves",
        "executed": "the grouped product's FLOPs depend on the routing kernel; the counter has no formula for it",
    }

    @property
    def k(self) -> int:
        return int(self.router.k)  # type: ignore[attr-defined]

    @property
    def maps(self) -> tuple[str, ...]:
        """The maps of an expert, the one out of it last."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    def check(self, site: Site) -> None:
        if self.clamp is not None and (self.act != "silu" or not self.gated):
            raise ValueError(f"`clamp` is made for gated silu; `act` is {self.act!r}, `gated` {self.gated}")
        token_by_token("norm", self.norm)
        for name, (child, place) in self.children(site).items():
            child.check(place)
            if child.state(place):
                raise ValueError(f"`{name}` {child.kind_name()!r} remembers tokens; accepted: a part without a state")

    def inner(self, site: Site) -> int:
        """The width at which the experts read and write."""
        return site.d_in if self.latent is None else self.latent

    def pieces(self, site: Site) -> Mapping[str, int]:
        """Experts are dealt out whole."""
        return {"expert": self.experts, "tensor": 0}

    def linears(self, site: Site) -> dict[str, Fan]:
        if self.latent is None:
            return {}
        return {
            "into": Fan(site.d_in, self.latent, self.bias),
            "back": Fan(self.latent, site.d_out, self.bias, out=True),
        }

    def own(self, site: Site) -> dict[str, Weight]:
        d, d_out = self.inner(site), site.d_out if self.latent is None else self.latent
        share, init = self.k / self.experts, site.init
        last = init.matrix(self.width) if self.latent is not None else init.out(self.width, site.layers)
        table = {}
        for name in self.maps:
            n, m = (d_out, self.width) if name == "down" else (self.width, d)
            drawn = last if name == "down" else init.matrix(d)
            table[name] = Weight((self.experts, n, m), "expert", drawn, split=0, active=share)
            if self.bias:
                table[f"{name}_bias"] = Weight((self.experts, n), "vector", Init.constant(0.0), split=0, active=share)
        return table

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        found: dict[str, tuple[PartSpec, Site]] = {
            "router": (self.router, site.child("router", site.d_in, self.experts))
        }
        if self.norm is not None:
            found["norm"] = (self.norm, site.child("norm", site.d_in, site.d_in))
        if self.shared is not None:
            found["shared"] = (self.shared, site.child("shared"))
        return found

    def build(self, site: Site) -> MoeFfn:
        return MoeFfn(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(experts=4, width=16)
        yield cls.model_validate(
            {"experts": 3, "width": 5, "act": "gelu", "router": {"kind": "topk", "k": 1, "renormalise": False}}
        )
        yield cls.model_validate({"experts": 4, "width": 6, "bias": True, "clamp": {"limit": 0.8}})
        router: dict[str, Any] = {"kind": "topk", "score": "sigmoid", "select_bias": True, "scale": 1.5}
        router["groups"] = {"count": 3, "top": 2}
        yield cls.model_validate(
            {"experts": 6, "width": 5, "router": router, "shared": {"kind": "gated", "width": 7, "share": True}}
        )
        small = {"gated": False, "act": "relu2", "latent": 12, "bias": True, "norm": "rmsnorm", "input_scaled": True}
        router = {"kind": "topk", "norm": {"kind": "rmsnorm", "eps": 1e-2}, "expert_gain": True}
        yield cls.model_validate(
            {"experts": 4, "width": 6, **small, "router": router, "shared": {"kind": "dense", "width": 9}}
        )


Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows [M, C] sorted by expert, the expert of each [M], and how many each has [E] -> [M, C]."""
Across = Callable[[Experts, Tensor, Tensor], Tensor]
"""The experts, rows sorted by expert and counts of all experts -> the rows' outputs, in their order."""


class MoeFfn(Ffn):
    """[N, D] -> [N, D]. Experts are [E, F, D] and [E, D, F]; rows are sorted by expert, so no loop and no host sync.
    across: carries rows to the processes that have their experts and back, where a plan dealt these out."""

    def __init__(self, spec: Moe, site: Site) -> None:
        super().__init__(spec, site)
        self.across: Across | None = None

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        choice, share = self.router(x, step, here["router"])
        read = x if self.spec.norm is None else self.norm(x, step)
        read = read if self.spec.latent is None else self.into(read, step)
        y = self.routed(read, choice, share)
        y = y if self.spec.latent is None else self.back(y, step)
        return y if self.spec.shared is None else y + self.shared(x, step, here["shared"])

    def routed(
        self, x: Float[Tensor, "N C"], choice: Int[Tensor, "N k"], share: Float[Tensor, "N k"]
    ) -> Float[Tensor, "N C"]:
        """The chosen experts' outputs by their shares. Rows are put back in the tokens' order and summed in the order
        of the choice, so that a token's sum does not depend on where the others went."""
        few = None if self.across is not None or self.spec.input_scaled else self.few(x, choice, share)
        if few is not None:
            return few
        n, k = choice.shape
        flat = choice.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.zeros(self.spec.experts, dtype=torch.long, device=x.device)
        counts = counts.index_add(0, flat, torch.ones_like(flat))
        weight = share.flatten().index_select(0, order)[:, None]
        rows = x.index_select(0, order // k)
        rows = rows * weight if self.spec.input_scaled else rows
        expert = flat.index_select(0, order)
        if self.across is None:
            out = self.experts(rows, expert, counts)
        else:
            out = self.across(self.experts, rows, counts)
        out = out if self.spec.input_scaled else out * weight
        back = torch.empty_like(order).scatter(0, order, torch.arange(n * k, device=x.device))
        return out.index_select(0, back).view(n, k, -1).sum(1)

    def few(self, x: Tensor, choice: Tensor, share: Tensor) -> Float[Tensor, "N C"] | None:
        """The same for a few tokens in inference, without sorting them: a compiled kernel reads the experts that are
        chosen. None where it does not serve."""

        def maps(*names: str) -> list[tuple[Tensor, Tensor | None]]:
            return [(getattr(self, n), getattr(self, f"{n}_bias") if self.spec.bias else None) for n in names]

        made = chosen(x, maps(*self.spec.maps[:-1]), choice)
        found = None if made is None else chosen(self.acted(*made), maps(self.spec.maps[-1]), choice)
        return None if found is None else (found[0] * share[..., None]).sum(1)

    def experts(
        self, rows: Float[Tensor, "M C"], expert: Int[Tensor, "M"], counts: Int[Tensor, "E"]
    ) -> Float[Tensor, "M C"]:
        """Each row through the expert it is sorted to."""

        def mapped(name: str, z: Tensor) -> Tensor:
            y = grouped(z, getattr(self, name), counts)
            return y + getattr(self, f"{name}_bias").index_select(0, expert) if self.spec.bias else y

        return mapped("down", self.acted(*(mapped(name, rows) for name in self.spec.maps[:-1])))

    def acted(self, *made: Tensor) -> Tensor:
        """What the maps into an expert made, through its nonlinearity."""
        rule = self.spec.clamp
        if not self.spec.gated:
            return activate(self.spec.act, made[0])
        gate, up = made
        if rule is None:
            return glu(self.spec.act, gate, up)
        gate, up = gate.clamp(max=rule.limit), up.clamp(-rule.limit, rule.limit)
        return (up + 1) * gate * torch.sigmoid(rule.alpha * gate)


def reference(spec: Moe, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: every token and every chosen expert in turn."""

    def below(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}

    def linear(name: str, z: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ z + weights.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))

    def expert(e: int, z: Tensor) -> Tensor:
        def mapped(name: str, v: Tensor) -> Tensor:
            return weights[name][e] @ v + (weights[f"{name}_bias"][e] if spec.bias else 0.0)

        if not spec.gated:
            return mapped("down", reference_activation(spec.act, mapped("up", z)))
        gate, up = mapped("gate", z), mapped("up", z)
        if spec.clamp is None:
            return mapped("down", reference_activation(spec.act, gate) * up)
        limit = torch.full_like(gate, spec.clamp.limit)
        gate, up = torch.minimum(gate, limit), torch.maximum(torch.minimum(up, limit), -limit)
        return mapped("down", (up + 1) * gate / (1 + torch.exp(-spec.clamp.alpha * gate)))

    rows = []
    for row, picked in zip(x, topk.reference(spec.router, below("router"), x), strict=True):  # type: ignore[arg-type]
        z = row
        if spec.norm is not None:
            z = row / ((row * row).mean() + spec.norm.eps) ** 0.5 * weights["norm.weight"]  # type: ignore[attr-defined]
        z = z if spec.latent is None else linear("into", z)
        y = torch.zeros_like(z)
        for e, share in picked:
            y = y + (expert(e, share * z) if spec.input_scaled else share * expert(e, z))
        rows.append(y if spec.latent is None else linear("back", y))
    out = torch.stack(rows)
    if spec.shared is None:
        return out
    other = {"gated": gated.reference, "dense": dense.reference}[spec.shared.kind_name()]
    return out + other(spec.shared, below("shared"), x, positions)  # type: ignore[operator]

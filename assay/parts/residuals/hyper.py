"""Hyper-connections: several residual streams, and learned ways between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.precision import high
from assay.ops.step import Step
from assay.parts._checks import token_by_token
from assay.parts.base import Residual
from assay.spec.base import Cost, Init, NormSpec, PartSpec, ResidualSpec, Site, Weight


class Hyper(ResidualSpec):
    """H' = B^T f(A_m^T H) + A_r^T H for `streams` streams H [n, D]. Zhu et al. 2024, arXiv 2409.19606, section 2.

    dynamic: the norm behind which the streams say what is added to A_m, B and A_r, s tanh(norm(H) W), the maps at first
    0 and s 0.01; null is static. Streams begin as copies of the embedding and end as their sum. A_m begins as row
    `layer` mod n of the identity, B as ones, A_r as the identity (stored less it): as the plain residual connection.
    """

    kind: Literal["hyper"] = "hyper"
    streams: int = Field(default=4, ge=1)
    dynamic: NormSpec | None = Field(default="layernorm", validate_default=True)

    def check(self, site: Site) -> None:
        token_by_token("dynamic", self.dynamic)

    def own(self, site: Site) -> dict[str, Weight]:
        n, zero = self.streams, Init.constant(0.0)
        first = Init.tiled(*(float(i == site.layer % n) for i in range(n)))
        found = {
            "read": Weight((n,), "vector", first),
            "write": Weight((n,), "vector", Init.constant(1.0)),
            "mix": Weight((n, n), "vector", zero),
        }
        if self.dynamic is None:
            return found
        small = Weight((1,), "vector", Init.constant(0.01))
        return found | {"width_scale": small, "depth_scale": small, "maps": Weight((n + 2, site.d_in), "vector", zero)}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {} if self.dynamic is None else {"norm": (self.dynamic, site.child("norm"))}

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """A_m and B once for each stream, A_r for each pair of streams, and n + 2 products a stream for the maps."""
        n, width = self.streams, 2 * site.d_in * new
        products = n * n + (0 if self.dynamic is None else n * (n + 2))
        return Cost(width * (2 * n + products), width * products)

    def build(self, site: Site) -> HyperResidual:
        return HyperResidual(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(streams=3)
        yield cls(streams=2, dynamic=None)


class HyperResidual(Residual):
    """The stream is [N, n, D]."""

    def open(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N n D"]:
        return x[:, None].expand(-1, self.spec.streams, -1)

    def wrap(self, h: Tensor, f: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        if h.dim() != 3 or h.shape[1] != self.spec.streams:
            raise ValueError(
                f"{self.name}: a stream of shape {tuple(h.shape)}; accepted: [N, {self.spec.streams}, D], which all "
                f"residuals of the model must carry"
            )
        read, write, mix = (w.to(h.dtype) for w in self.ways(h, step))
        y = f((read[..., None] * h).sum(-2))
        return write[..., None] * y[:, None] + mix.transpose(-1, -2) @ h

    def ways(self, h: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """A_m [N, n], B [N, n] and A_r [N, n, n]; without the axis of tokens where they are static."""
        read, write, mix = high(self.read), high(self.write), high(self.mix)
        mix = mix + torch.eye(self.spec.streams, dtype=mix.dtype, device=mix.device)
        if self.spec.dynamic is None:
            return read, write, mix.expand(h.shape[0], -1, -1)
        told = torch.tanh(high(self.norm(h, step)) @ high(self.maps).T)  # [N, n, n + 2]
        across, down = high(self.width_scale), high(self.depth_scale)
        return read + across * told[..., 0], write + down * told[..., 1], mix + across * told[..., 2:]

    def close(self, h: Float[Tensor, "N n D"]) -> Float[Tensor, "N D"]:
        return h.sum(-2)


def reference(spec: Hyper, weights: dict[str, Tensor], h: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """[N, D] in float64 for one stage between the opening and the closing: one token and one stream at a time."""
    streams = [[row for _ in range(spec.streams)] for row in h]
    asked, ways = [], []
    for one in streams:
        a, b, r = _ways(spec, weights, one)
        ways.append((b, r))
        asked.append(sum((a[i] * one[i] for i in range(spec.streams)), torch.zeros_like(one[0])))
    rows = []
    for one, y, (b, r) in zip(streams, f(torch.stack(asked)), ways, strict=True):
        new = [b[i] * y + sum(r[j][i] * one[j] for j in range(spec.streams)) for i in range(spec.streams)]
        rows.append(torch.stack(new).sum(0))
    return torch.stack(rows)


def _ways(spec: Hyper, weights: dict[str, Tensor], streams: list[Tensor]) -> tuple[list[Any], list[Any], list[Any]]:
    """A_m, B and A_r of one token; the norm is written out for the layer norm."""
    n = spec.streams
    read, write = list(weights["read"]), list(weights["write"])
    mix = [[weights["mix"][i, j] + float(i == j) for j in range(n)] for i in range(n)]
    if spec.dynamic is None:
        return read, write, mix
    across, down = weights["width_scale"][0], weights["depth_scale"][0]
    for i, x in enumerate(streams):
        x = x - x.mean()
        eps: float = spec.dynamic.eps  # type: ignore[attr-defined]
        x = x / ((x * x).mean() + eps) ** 0.5 * weights["norm.weight"] + weights["norm.bias"]
        told = [torch.tanh(row @ x) for row in weights["maps"]]
        read[i], write[i] = read[i] + across * told[0], write[i] + down * told[1]
        mix[i] = [mix[i][j] + across * told[2 + j] for j in range(n)]
    return read, write, mix

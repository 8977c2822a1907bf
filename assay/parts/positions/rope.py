"""Rotary position embedding, its context extensions, and both as functions for anyone's attention.

Legend: K head size, D = dim / 2 turned pairs, B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from assay.ops.native import training
from assay.ops.state import State
from assay.ops.step import Step, View
from assay.parts.base import Position
from assay.parts.positions._scaling import (
    AnyScaling,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    PowerScaling,
    ProportionalScaling,
    TruncatedScaling,
    YarnScaling,
    inverse,
)
from assay.spec.base import PositionSpec, Site


class Rope(PositionSpec):
    """Rotates pairs (i, i + dim/2) of q and k by position * theta^(-2i/dim). Su et al. 2021, arXiv 2104.09864.

    dim: how many leading dimensions of a head are turned (partial RoPE); null turns all. No weights, so `scaling` may
    be changed on a trained model. turns: whether keys are stored turned (`write`) or raw and turned when they are
    read; null is `read` where the angles depend on the length (one stored prefix serves any horizon), else `write`.
    """

    kind: Literal["rope"] = "rope"
    theta: float = Field(default=10_000.0, gt=1.0)
    dim: int | None = Field(default=None, ge=2)
    scaling: AnyScaling | None = None
    turns: Literal["write", "read"] | None = None

    @property
    def reads(self) -> bool:
        """Keys are stored raw."""
        return self.by_length if self.turns is None else self.turns == "read"

    @property
    def by_length(self) -> bool:
        return self.scaling is not None and self.scaling.by_length

    def check(self, site: Site) -> None:
        if self.scaling is not None and self.by_length and not self.reads:
            raise ValueError(
                f"`turns: write` with {self.scaling.kind!r} scaling: its angles depend on the length; accepted: read"
            )
        if self.dim is not None:
            self.fits(1, self.dim)

    def fits(self, heads: int, head_dim: int) -> None:
        dim = self.dim or head_dim
        if dim % 2:
            raise ValueError(f"RoPE turns pairs: {dim} dimensions are odd; give an even `dim` or head size")
        if dim > head_dim:
            raise ValueError(f"`dim` is {dim}, but a head has {head_dim} dimensions")
        if self.scaling is not None:
            self.scaling.check(dim)

    def frequencies(self, head_dim: int, horizon: Int[Tensor, "B"]) -> Float[Tensor, "... D"]:
        """Radians a token for each pair: [D], or [B, D] where they depend on the length; float64 where there is one."""
        inv = inverse(self.theta, self.dim or head_dim, horizon.device)
        return inv if self.scaling is None else self.scaling.frequencies(self.theta, inv, horizon)

    def pieces(self, site: Site) -> Mapping[str, int]:
        """All heads are told the same."""
        return {"tensor": 0}

    def build(self, site: Site) -> RopePosition:
        return RopePosition(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(scaling=ProportionalScaling(kind="proportional", share=0.5))
        yield cls(theta=100.0, dim=4, turns="read")
        yield cls(scaling=LinearScaling(kind="linear", factor=2.0))
        yield cls(scaling=NtkScaling(kind="ntk", factor=4.0))
        yield cls(scaling=DynamicScaling(kind="dynamic", factor=2.0, original=8))
        yield cls(scaling=YarnScaling(kind="yarn", factor=4.0, original=64, beta_fast=8.0, beta_slow=2.0))
        yield cls(dim=4, scaling=Llama3Scaling(kind="llama3", factor=8.0, original=16))
        yield cls(
            dim=4, scaling=LongRopeScaling(kind="longrope", short=(1.0, 1.5), long=(2.0, 5.0), original=8, factor=4.0)
        )
        yield cls(scaling=PowerScaling(kind="power", exponent=0.4))
        yield cls(scaling=TruncatedScaling(kind="truncated", low=0.005, high=0.05, between=0.02))


class Turns(NamedTuple):
    """cos [..., 1, K] (ones where nothing turns) and sin [..., 1, D], ready to meet [..., heads, K]."""

    cos: Tensor
    sin: Tensor

    def to(self, dtype: torch.dtype) -> Turns:
        return Turns(self.cos.to(dtype), self.sin.to(dtype))


def turns(
    spec: Rope,
    positions: Int[Tensor, "*n"],
    head_dim: int,
    horizon: Int[Tensor, "B"],
    seq: Int[Tensor, "*n"] | None = None,
) -> Turns:
    """The rotation of every position; `seq` says whose horizon counts where several are given."""
    freq = spec.frequencies(head_dim, horizon)
    if freq.dim() == 2:
        # Padding is -1, and training gives one horizon for all however many documents are packed.
        freq = freq[seq.clamp(0, freq.shape[0] - 1)] if seq is not None else freq[0]
    angles = positions[..., None].to(freq.dtype) * freq
    gain = 1.0 if spec.scaling is None else spec.scaling.gain
    cos, sin = angles.cos() * gain, angles.sin() * gain
    still = cos.new_ones(*cos.shape[:-1], head_dim - 2 * cos.shape[-1])
    return Turns(torch.cat([cos, cos, still], -1).unsqueeze(-2), sin.unsqueeze(-2))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By a compiled kernel; else one product and two fused updates in place: half the time of concatenating turned
    halves."""
    native = training(x, half=True)
    found = None if native is None else native.turn(x, cos, sin)
    if found is not None:
        return found
    (cos, sin), half = Turns(cos, sin).to(x.dtype), sin.shape[-1]
    out = x * cos
    out[..., :half].addcmul_(x[..., half : 2 * half], sin, value=-1)
    out[..., half : 2 * half].addcmul_(x[..., :half], sin)
    return out


class _Turn(torch.autograd.Function):
    """Its gradient is the turn the other way, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Turn.apply(grad, cos, -sin), None, None


def turn(x: Float[Tensor, "*n H K"], angle: Turns) -> Float[Tensor, "*n H K"]:
    """Rotate the leading dimensions in half-split pairs; in x's dtype, so exact to its rounding of cos and sin."""
    return _Turn.apply(x, *angle) if torch.is_grad_enabled() and x.requires_grad else _rotated(x, *angle)


class RopePosition(Position):
    def __init__(self, spec: Rope, site: Site) -> None:
        super().__init__(spec, site)
        self.sizes: tuple[int, ...] = ()

    def serve(self, heads: int, head_dim: int) -> None:
        super().serve(heads, head_dim)
        self.sizes = tuple(sorted({*self.sizes, head_dim}))

    def mingles(self) -> str | None:
        return "it turns keys again with every step" if self.spec.reads else None

    def prepare_key(self) -> object | None:
        return ("rope", self.spec, self.sizes) if self.sizes else None

    def prepare(self, step: Step, state: State | None) -> dict[int, Turns]:
        """The turns of the step's tokens for each size of head, in float32."""
        return {size: self.at(step.positions, step.seq, size, step).to(torch.float32) for size in self.sizes}

    def at(self, positions: Tensor, seq: Tensor, head_dim: int, step: Step) -> Turns:
        return turns(self.spec, positions, head_dim, step.horizon, seq)

    def of(self, x: Tensor, step: Step) -> Turns:
        """The step's table; float64, which only checks use, and a size nobody announced are computed here."""
        table, size = step.table(self) or {}, x.shape[-1]
        if size in table and x.dtype != torch.float64:
            return table[size]
        return self.at(step.positions, step.seq, size, step).to(x.dtype)

    def on_qk(self, q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        angle = self.of(q, step)
        return turn(q, angle), k if self.spec.reads else turn(k, angle)

    def on_read(self, q: Tensor, view: View, step: Step) -> tuple[Tensor, View]:
        if not self.spec.reads:
            return q, view
        k, layout = view.dense("k"), view.layout
        turned = turn(k, self.at(layout.positions, layout.seq, k.shape[-1], step))
        return q, View({**view.fields, "k": turned}, layout)


def apply_rope(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    positions: Int[Tensor, "T"] | Int[Tensor, "B T"],
    theta: float = 10_000.0,
    dim: int | None = None,
    scaling: AnyScaling | dict[str, Any] | None = None,
    length: int | None = None,
) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B G T K"]]:
    """RoPE on ordinary attention tensors: queries and keys of the same tokens, turned in half-split pairs.

    scaling: a value of this module or its mapping. length: what length-dependent scalings plan for; null is the
    largest position + 1. Raises ValueError for sizes that do not turn.

        q, k = apply_rope(q, k, torch.arange(q.shape[2]), theta=500_000.0, scaling={"kind": "linear", "factor": 4.0})
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    """
    spec = Rope.model_validate({"theta": theta, "dim": dim, "scaling": scaling})
    spec.fits(q.shape[1], q.shape[-1])
    horizon = positions.max().view(1) + 1 if length is None else torch.full((1,), length, device=positions.device)
    angle = turns(spec, positions, q.shape[-1], horizon)
    first, second = (turn(x.transpose(1, 2), angle).transpose(1, 2) for x in (q, k))
    return first, second


def wavelengths(spec: Rope, head_dim: int, length: int = 1) -> list[float]:
    """Tokens in a full turn of each pair, 2 pi / frequency, shortest first for plain RoPE.

    A pair whose wavelength is over the training length never completes a turn in training.
    """
    spec.fits(1, head_dim)
    freq = spec.frequencies(head_dim, torch.tensor([length])).view(-1, (spec.dim or head_dim) // 2)[0]
    return (2 * math.pi / freq).tolist()


def reference(
    spec: Rope, weights: dict[str, Tensor], q: Tensor, k: Tensor, positions: Tensor, horizon: int | None = None
) -> tuple[Tensor, Tensor]:
    """q [N, H, K] and k [N, G, K] of one sequence, turned in float64 a pair at a time.

    horizon: the length that length-dependent scalings plan for; null is the largest position + 1.
    """
    length = int(positions.max()) + 1 if horizon is None else horizon
    dim = spec.dim if spec.dim is not None else q.shape[-1]
    q, k = q.double().clone(), k.double().clone()
    for n, position in enumerate(positions.tolist()):
        for i in range(dim // 2):
            freq, gain = _reference_pair(spec.theta, dim, i, spec.scaling, length)
            c, s = gain * math.cos(position * freq), gain * math.sin(position * freq)
            for x in (q, k):
                for h in range(x.shape[1]):
                    a, b = float(x[n, h, i]), float(x[n, h, i + dim // 2])
                    x[n, h, i], x[n, h, i + dim // 2] = a * c - b * s, b * c + a * s
    return q, k


def _reference_pair(theta: float, dim: int, i: int, s: Any, length: int) -> tuple[float, float]:
    """Frequency and gain of pair i, as the papers write them."""
    plain = 1.0 / theta ** (2 * i / dim)
    if s is None:
        return plain, 1.0
    if s.kind == "proportional":
        return (plain if i < int(s.share * (dim // 2)) else 0.0), 1.0
    if s.kind == "linear":
        return plain / s.factor, 1.0
    if s.kind == "power":
        return plain * (1 - 2 * i / dim) ** s.exponent, 1.0
    if s.kind == "truncated":
        return (plain if plain >= s.high else 0.0 if plain <= s.low else s.between), 1.0
    if s.kind in ("ntk", "dynamic"):
        scale = s.factor if s.kind == "ntk" else max(1.0, s.factor * length / s.original - (s.factor - 1))
        return 1.0 / (theta * scale ** (dim / (dim - 2))) ** (2 * i / dim), 1.0
    if s.kind == "longrope":
        gain = s.attention_factor or (1 + math.log(s.factor) / math.log(s.original)) ** 0.5
        return plain / (s.long if length > s.original else s.short)[i], gain
    turned = s.original * plain / (2 * math.pi)  # full turns within the training length
    if s.kind == "llama3":
        if turned <= s.low_freq_factor or turned >= s.high_freq_factor:
            return (plain / s.factor if turned <= s.low_freq_factor else plain), 1.0
        keep = (turned - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        return keep * plain + (1 - keep) * plain / s.factor, 1.0
    ends = [dim / 2 * math.log(s.original / (2 * math.pi * r), theta) for r in (s.beta_fast, s.beta_slow)]
    ends = [math.floor(ends[0]), math.ceil(ends[1])] if s.truncate else ends
    low, high = max(ends[0], 0), min(ends[1], dim - 1)
    share = min(max((i - low) / (high - low or 0.001), 0.0), 1.0)
    scale = math.log(s.factor)
    gain = (0.1 * (s.mscale or 1) * scale + 1) / (0.1 * (s.mscale_all_dim or 0) * scale + 1)
    return (1 - share) * plain + share * plain / s.factor, s.attention_factor or gain

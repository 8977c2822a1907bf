"""Matrices held in 8 or 4 bits, and their product with rows that are rounded to 8 bits on the way.

A group is 32 neighbouring inputs of one output. It has one scale s in bfloat16 and codes u of 8 or 4 bits; the weights
are s (u - 128) or s (u - 8). Rows of x are cut into the same groups and rounded to 8 bits with a scale of their own,
absmax / 127 (as llama.cpp does for Q8_0 and Q4_0). Sums inside a group are of integers, hence exact; the groups are
added in their order by fused multiply-adds in float32. A row's result therefore has the same bits whatever stands
beside it, here and in the compiled kernel.

Legend: T tiles of 16 outputs, G groups of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from assay.ops.native import rounding

GROUP, TILE, LINE = 32, 16, 64
BITS = (8, 4)
AT_ONCE = 1 << 22  # weights that are worked on together


def packed_bytes(out: int, size: int, bits: int) -> int:
    """Bytes of a matrix [out, size]: 8.5 or 4.5 bits a weight, in whole tiles, groups and cache lines."""
    groups = -(-size // GROUP)
    return -(-out // TILE) * (_scales(groups) + groups * LINE * bits)


def _scales(groups: int) -> int:
    """Bytes of a tile's scales, up to where its codes begin."""
    return -(-groups * TILE * 2 // LINE) * LINE


class Packed(Tensor):
    """A matrix by its shape [out, size], of the float dtype that its values are read in. What it holds is `codes`
    [T, bytes]: of each tile the scales [G, 16], then the codes in the order of the compiled kernel. Or the matrices of
    several experts, [E, out, size], whose tiles lie behind one another.

    It can be multiplied with (`ops.linear`, `F.linear`, `ops.grouped`) and looked up in (`F.embedding`); any other
    operation sees the matrix of its values. It has no gradient.
    """

    codes: Tensor
    bits: int
    experts: tuple[int, ...]
    out: int
    width: int

    @staticmethod
    def __new__(cls, codes: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> Packed:
        made: Packed = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        made.codes, made.bits, (*experts, made.out, made.width) = codes, bits, shape
        made.experts = tuple(experts)
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Packed({' x '.join(map(str, (*self.experts, self.out, self.width)))}, {self.bits} bits)"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return linear(*args, **kwargs or {})
        if func is F.embedding:
            return looked_up(args[0], args[1])
        if func is Tensor.to and args[1:] == (args[0].dtype,) and not kwargs:
            return args[0]  # nothing is done: nobody who looks on shall see an operation
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            with torch.inference_mode(False):  # a view's version is set, which an inference tensor has not
                return args[0].like(args[0].codes, args[0].dtype)
        if func is torch.ops.aten.clone.default:
            return args[0].like(args[0].codes.clone(), args[0].dtype)
        if func is torch.ops.aten._to_copy.default:
            return args[0].like(args[0].codes.to(kwargs.get("device")), kwargs.get("dtype") or args[0].dtype)
        if func.overloadpacket is torch.ops.aten.to:  # inference mode does not take it apart
            return func.decompose(*args, **kwargs)
        if func._schema.is_mutable:
            raise TypeError(f"{func}: packed weights are not written to: pack the matrix that they shall stand for")
        dense = [a.values_() if isinstance(a, Packed) else a for a in args]
        return func(*dense, **{k: a.values_() if isinstance(a, Packed) else a for k, a in kwargs.items()})

    def like(self, codes: Tensor, dtype: torch.dtype) -> Packed:
        return Packed(codes, self.bits, (*self.experts, self.out, self.width), dtype)

    def each(self) -> list[Packed]:
        """The matrices of the experts."""
        pieces = self.codes.chunk(*self.experts)
        return [Packed(codes, self.bits, (self.out, self.width), self.dtype) for codes in pieces]

    def parts(self, tiles: slice = slice(None)) -> tuple[Int[Tensor, "T 16 K"], Float[Tensor, "T 16 G"]]:
        """Codes less that of zero, in int8 and padded to whole groups, and scales in float32."""
        held, groups = self.codes[tiles], -(-self.width // GROUP)
        scales = held[:, : groups * TILE * 2].contiguous().view(torch.bfloat16)
        found = held[:, _scales(groups) :].unflatten(1, (groups, self.bits, TILE, 4))
        if self.bits == 4:
            found = torch.cat([found & 15, found >> 4], 2)
        codes = found.permute(0, 3, 1, 2, 4).flatten(2).to(torch.int16) - (1 << self.bits - 1)
        return codes.to(torch.int8), scales.unflatten(1, (groups, TILE)).transpose(1, 2).float()

    def values_(self, tiles: slice = slice(None)) -> Float[Tensor, "*E N K"]:
        """What these tiles stand for."""
        if self.experts:
            return torch.stack([one.values_() for one in self.each()])
        codes, scales = self.parts(tiles)
        found = codes.unflatten(2, (-1, GROUP)) * scales[..., None]
        count = len(range(*tiles.indices(self.codes.shape[0]))) * TILE
        first = tiles.indices(self.codes.shape[0])[0] * TILE
        return found.reshape(count, -1)[: self.out - first, : self.width].to(self.dtype)

    def pieces(self) -> list[slice]:
        """Tiles that are worked on together."""
        step = max(1, AT_ONCE // (TILE * max(1, self.width)))
        return [slice(i, min(i + step, self.codes.shape[0])) for i in range(0, self.codes.shape[0], step)]


def held_bytes(w: Tensor) -> int:
    """Bytes that a parameter takes."""
    return w.codes.numel() if isinstance(w, Packed) else w.numel() * w.element_size()


def pack(w: Float[Tensor, "*E N K"], bits: int) -> Packed:
    """The nearest matrix, or each of several: in 8 bits with scales of absmax / 127, in 4 with absmax / 8 of the sign
    that gives the largest value a code. ValueError for other bits and for values that are not finite."""
    if bits not in BITS:
        raise ValueError(f"packed weights of {bits} bits; accepted: {', '.join(map(str, BITS))}")
    if not bool(w.isfinite().all()):
        raise ValueError("packed weights: the matrix holds values that are not finite; accepted: finite ones")
    rows = max(TILE, AT_ONCE // max(1, w.shape[-1]) // TILE * TILE)
    matrices = w.detach().unbind() if w.dim() == 3 else [w.detach()]
    codes = torch.cat([_pack(piece.float(), bits) for one in matrices for piece in one.split(rows)])
    return Packed(codes, bits, tuple(w.shape), w.dtype)


def _pack(w: Float[Tensor, "N K"], bits: int) -> UInt8[Tensor, "T B"]:
    out, size = w.shape
    w = F.pad(w, (0, -size % GROUP, 0, -out % TILE)).view(-1, TILE, -(-size // GROUP), GROUP)
    tiles, _, groups, _ = w.shape
    scales = (eighths(w) if bits == 8 else sixteenths(w)).bfloat16()
    top = (1 << bits - 1) - 1
    codes = _codes(w, scales.float(), -top - (bits == 4), top) + (1 << bits - 1)
    laid = codes.to(torch.uint8).unflatten(3, (8, 4)).permute(0, 2, 3, 1, 4)
    if bits == 4:
        laid = laid[:, :, :4] | laid[:, :, 4:] << 4
    head = scales.transpose(1, 2).reshape(tiles, -1).contiguous().view(torch.uint8)
    return torch.cat([F.pad(head, (0, _scales(groups) - head.shape[1])), laid.reshape(tiles, -1)], 1).contiguous()


def _codes(w: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    return (w / torch.where(scales == 0, 1.0, scales)[..., None]).round().clamp(low, high)


def eighths(w: Float[Tensor, "T 16 G 32"]) -> Float[Tensor, "T 16 G"]:
    """Scales for codes of -127 to 127."""
    return w.abs().amax(-1) / 127


def sixteenths(w: Float[Tensor, "T 16 G 32"]) -> Float[Tensor, "T 16 G"]:
    """Scales for codes of -8 to 7, of which the largest value gets -8, as in llama.cpp's Q4_0."""
    return w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0] / -8


def rounded(x: Float[Tensor, "M K"]) -> tuple[Float[Tensor, "M G 32"], Float[Tensor, "M G"]]:
    """Rows in whole numbers of -127 to 127 (held as float32) and their scales: NaN for a group that is not finite, 0
    for one below 2^-119, whose inverse is not."""
    groups = F.pad(x.float(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    most = groups.abs().amax(-1)
    counts = most.isfinite() & (most >= 2.0**-119)
    share = torch.where(counts, 127 / most, 0.0)[..., None]
    found = torch.where(counts[..., None], groups.double() * share.double(), 0.0).round().float()
    return found, torch.where(most.isfinite(), torch.where(counts, most / 127, 0.0), torch.nan)


def linear(x: Float[Tensor, "*n K"], w: Packed, b: Float[Tensor, "N"] | None = None) -> Float[Tensor, "*n N"]:
    """x w^T + b in x's dtype. ValueError where a gradient would be lost."""
    return linears(x, [(w, b)])[0]


def linears(x: Float[Tensor, "*n K"], maps: Sequence[tuple[Packed, Tensor | None]]) -> list[Tensor]:
    """The same x with several weights and biases; it is rounded once for all."""
    forward_only(x, maps[0][0])
    native = rounding(x)
    found = None if native is None else native.packed(x, maps)
    return [_linear(x, w, b) for w, b in maps] if found is None else found


def forward_only(x: Tensor, w: Packed) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"weights of {w.bits} bits have no gradient: they are for inference; train with float weights")


def grouped(x: Float[Tensor, "M K"], w: Packed, counts: Int[Tensor, "E"]) -> Float[Tensor, "M N"]:
    """Rows sorted by expert, the first counts[0] of the first, each times its expert's matrix. ValueError where a
    gradient would be lost."""
    forward_only(x, w)
    native = rounding(x)
    found = None if native is None else native.grouped(x, w, counts)
    if found is not None:
        return found
    rows, end, y = torch.arange(x.shape[0], device=x.device), counts.cumsum(0), x.new_zeros(x.shape[0], w.out)
    for e, one in enumerate(w.each()):
        inside = (rows >= end[e] - counts[e]) & (rows < end[e])
        y = torch.where(inside[:, None], product(x, one).to(x.dtype), y)
    return y


def _linear(x: Tensor, w: Packed, b: Tensor | None) -> Tensor:
    y = product(x.reshape(-1, w.width), w)
    return (y if b is None else y + b.float()).to(x.dtype).view(*x.shape[:-1], w.out)


def product(x: Float[Tensor, "M K"], w: Packed) -> Float[Tensor, "M N"]:
    """In torch, with the bits of the kernel: a product of float32 numbers that is added to a third and rounded once is
    exact in float64 until then."""
    rows, row_scales = rounded(x)
    found = []
    for tiles in w.pieces():
        codes, scales = w.parts(tiles)
        codes, scales = codes.flatten(0, 1).unflatten(1, (-1, GROUP)).float(), scales.flatten(0, 1)
        total = x.new_zeros(x.shape[0], codes.shape[0], dtype=torch.float32)
        for g in range(scales.shape[1]):
            share = row_scales[:, g, None] * scales[:, g]
            total = torch.addcmul(total.double(), (rows[:, g] @ codes[:, g].T).double(), share.double()).float()
        found.append(total)
    return torch.cat(found, 1)[:, : w.out]


def looked_up(ids: Int[Tensor, "*n"], w: Packed) -> Float[Tensor, "*n K"]:
    """Rows of the matrix."""
    flat = ids.reshape(-1)
    codes, scales = w.like(w.codes.index_select(0, flat // TILE), w.dtype).parts()
    lane = (flat % TILE)[:, None, None]
    found = (
        codes.take_along_dim(lane, 1)[:, 0].unflatten(1, (-1, GROUP)) * scales.take_along_dim(lane, 1)[:, 0, :, None]
    )
    return found.flatten(1)[:, : w.width].to(w.dtype).view(*ids.shape, w.width)

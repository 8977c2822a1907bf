"""Values that specs answer with: what is drawn, declared, remembered and paid. No pydantic, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["embed", "matrix", "vector", "expert", "head"]
Per = Literal["token", "sequence", "memory"]
Link = Literal["none", "log", "softplus", "sigmoid"]

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
}


class NestedError(ValueError):
    """A problem inside a part's own fields: `loc` is the path below the field that holds the part."""

    def __init__(self, loc: tuple[Any, ...], message: str) -> None:
        super().__init__(message)
        self.loc = loc


@dataclass(frozen=True)
class Init:
    """How a weight is drawn: `normal` (mean 0, `std`), `uniform` in (-std, std), or the constant `value`.

    `between` and `log_between` draw x in (low, high), evenly in x or in log x. `ramp` rises from low to high along the
    last dimension, as the `power` of the distance; `tiled` repeats `values` along it. Of these the parameter is
    `link(x)`: x itself, log x, or the p with softplus(p) = x or sigmoid(p) = x: a rate or a decay is drawn where its
    meaning is and stored as what the layer computes from.
    """

    kind: Literal["normal", "uniform", "constant", "between", "log_between", "ramp", "tiled"] = "normal"
    std: float = 0.02
    value: float = 0.0
    low: float = 0.0
    high: float = 1.0
    power: float = 1.0
    values: tuple[float, ...] = ()
    link: Link = "none"

    @staticmethod
    def constant(value: float) -> Init:
        return Init("constant", 0.0, value)

    @staticmethod
    def between(low: float, high: float, link: Link = "none", log: bool = False) -> Init:
        return Init("log_between" if log else "between", 0.0, low=low, high=high, link=link)

    @staticmethod
    def ramp(low: float, high: float, link: Link = "none", power: float = 1.0) -> Init:
        return Init("ramp", 0.0, low=low, high=high, power=power, link=link)

    @staticmethod
    def tiled(*values: float) -> Init:
        return Init("tiled", 0.0, values=values)

    @staticmethod
    def fan_in(fan: int, gain: float = 1.0) -> Init:
        return Init("normal", gain / math.sqrt(fan))


@dataclass(frozen=True)
class Weight:
    """One declared parameter: allocation, init, import shapes, sharding and decay groups come from this table.

    `shape` is torch's ([out, in] for a linear). `split` is the dimension that tensor parallelism cuts, and `sections`
    the sizes of what stands side by side along it, of which a rank has a piece each.
    `active` is the share of the weight that one token uses (top_k / experts for a routed expert).
    """

    shape: tuple[int, ...]
    role: Role = "matrix"
    init: Init = field(default_factory=Init)
    dtype: str = "float32"
    split: int | None = None
    sections: tuple[int, ...] = ()
    active: float = 1.0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def flops(self) -> int:
        """FLOPs per token of the product with this weight, 2 per multiply-add; lookups and scalings count nothing."""
        return round(2 * self.numel * self.active) if self.role in ("matrix", "expert", "head") else 0


@dataclass(frozen=True)
class Fan:
    """A linear map d_in -> d_out at a site. `out`: it writes to the residual stream. `split`: 0 column, 1 row."""

    d_in: int
    d_out: int
    bias: bool = False
    out: bool = False
    split: int | None = None
    role: Role = "matrix"


@dataclass(frozen=True)
class StateField:
    """What must be remembered: one entry a token, a sequence, or a token of the memory (cross-attention)."""

    name: str
    per: Per
    shape: tuple[int, ...]
    dtype: str = "model"
    init: float = 0.0
    split: int | None = None
    keep: int | None = None
    every: int = 1

    def entries(self, tokens: int, memory: int = 0) -> int:
        """How many entries a sequence of `tokens` tokens (and `memory` memory tokens) has that can still be read."""
        if self.per == "sequence":
            return 1
        count = memory if self.per == "memory" else tokens
        count = count if self.keep is None else min(count, self.keep)
        return count // self.every

    def slots(self, tokens: int, page: int, memory: int = 0) -> int:
        """Entries that storage reserves: whole pages of `page` tokens; a window keeps room for one page in flight."""
        if self.per == "sequence":
            return 1
        count = memory if self.per == "memory" else tokens
        if self.keep is not None:
            count = min(count, self.keep + page - 1)
        return -(-count // (page * self.every)) * page

    def bytes(self, tokens: int, dtype: str, memory: int = 0) -> int:
        width = DTYPE_BYTES[dtype if self.dtype == "model" else self.dtype]
        return self.entries(tokens, memory) * math.prod(self.shape) * width


@dataclass(frozen=True)
class Cost:
    """FLOPs that the linears do not cover.

    `flops`: what the mathematics needs (visible pairs, the recurrence). `executed`: what the matmul backend runs
    (full squares, padding), equal to torch's FlopCounterMode there. Both count 2 for each multiply-add.
    """

    flops: int = 0
    executed: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.executed + other.executed)

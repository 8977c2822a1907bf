"""Which keys a query sees: a value, combined with `&`, materialised only by a backend that must. No torch."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from assay.spec.base import Spec


class Sees(Spec):
    """Visibility by place in the sequence.

    causal: keys at or before the query. window: that many keys including the query's own (causal).
    chunk: only keys of the same block of `chunk` tokens. band: (left, right) neighbours of a bidirectional layer.
    first: the first n keys stay visible behind a window. With a band the first n tokens also see everything: the
    global tokens of an encoder (Longformer; Beltagy et al. 2020, arXiv 2004.05150, section 3.1).
    stride: behind the window every stride-th key back from the query stays visible (strided pattern of Sparse
    Transformers, both of its halves in one; Child et al. 2019, arXiv 1904.10509, section 4.3).
    last: the last n keys of each earlier chunk stay visible (fixed pattern, ibid.).
    prefix: causal, but the tokens of a sequence's prefix, whose length the step tells, all see one another (prefix LM;
    Liu et al. 2018, arXiv 1801.10198; Raffel et al. 2019, arXiv 1910.10683, figure 4).
    """

    causal: bool = True
    window: int | None = Field(default=None, ge=1)
    chunk: int | None = Field(default=None, ge=1)
    band: tuple[int, int] | None = None
    first: int = Field(default=0, ge=0)
    prefix: bool = False
    stride: int | None = Field(default=None, ge=2)
    last: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.window is not None and not self.causal:
            raise ValueError(
                "`window` counts keys back from a causal query; a bidirectional layer uses `band: [left, right]`"
            )
        if self.band is not None and (self.causal or min(self.band) < 0):
            raise ValueError("`band: [left, right]` is for `causal: false`, with both >= 0")
        if self.first and self.window is None and self.band is None:
            raise ValueError("`first` keeps the first keys visible behind a `window` or a `band`, which is missing")
        if self.first and self.chunk is not None:
            raise ValueError("`first` and `chunk` are not combined")
        if self.prefix and not (self.causal and self.everything):
            raise ValueError("`prefix` widens a causal rule; it is not combined with `window`, `chunk` or `band`")
        self._behind()
        return self

    def _behind(self) -> None:
        """What may stand beside `stride` and `last`."""
        if self.stride is not None and (self.window is None or self.chunk is not None or self.first):
            raise ValueError("`stride` shows keys behind a `window`; it is not combined with `chunk` or `first`")
        if self.last and (self.chunk is None or not self.causal or self.window is not None):
            raise ValueError("`last` shows the ends of earlier causal chunks; it needs `chunk`, and no `window`")
        if self.last and self.chunk is not None and self.last >= self.chunk:
            raise ValueError(f"`last` is {self.last}; accepted: 0 to {self.chunk - 1}, less than `chunk`")

    def visible(self, q: Any, k: Any, prefix: Any = None) -> Any:
        """Boolean mask for broadcastable integer arrays or tensors of places: q [..., T, 1], k [..., 1, S]. prefix, of
        q's shape: how long the prefix of its sequence is; None: there is none."""
        seen = (k <= q) if self.causal else (k == k) & (q == q)
        if self.prefix and prefix is not None:
            seen = seen | (k < prefix)  # behind the prefix all of it is in the past
        if self.window is not None:
            near = k > q - self.window
            near = near | (k < self.first) if self.first else near
            seen = seen & (near if self.stride is None else near | ((q - k) % self.stride == 0))
        if self.chunk is not None:
            same = k // self.chunk == q // self.chunk
            seen = seen & (same | (k % self.chunk >= self.chunk - self.last) if self.last else same)
        if self.band is not None:
            near = (k >= q - self.band[0]) & (k <= q + self.band[1])
            seen = seen & (near | (k < self.first) | (q < self.first) if self.first else near)
        return seen

    @property
    def everything(self) -> bool:
        """Nothing but causality (or not even that) limits what is seen."""
        return self.window is None and self.chunk is None and self.band is None

    @property
    def keep(self) -> int | None:
        """Tokens that a later query can still see, counted back from it; None: all of them."""
        if self.first or self.scattered:
            return None
        limits = [n for n in (self.window, self.chunk) if n is not None]
        return min(limits) if limits else None

    @property
    def scattered(self) -> bool:
        """Single keys below the span of a query are visible, wherever they stand."""
        return self.stride is not None or self.last > 0

    def spans(self, q: Any, total: int, prefix: Any = 0) -> tuple[Any, Any]:
        """Lowest and highest visible place, inclusive, of each place in the array q when `total` tokens are stored;
        what lies between is visible, and so are the `first` keys below, and those of `stride` and `last`. prefix: a
        length for all, or one for each."""
        low, high = np.zeros_like(q), q if self.causal else np.full_like(q, total - 1)
        if self.prefix:
            high = np.maximum(high, np.minimum(prefix, total) - 1)
        if self.chunk is not None:
            low, high = q // self.chunk * self.chunk, np.minimum(high, q // self.chunk * self.chunk + self.chunk - 1)
        if self.band is not None:
            low, high = np.maximum(low, q - self.band[0]), np.minimum(high, q + self.band[1])
            if self.first:
                low, high = np.where(q < self.first, 0, low), np.where(q < self.first, total - 1, high)
        if self.window is not None:
            low = np.maximum(low, q - self.window + 1)
        return low, high

    def lowest(self, q: Any, low: Any) -> Any:
        """The lowest visible place of each place in q, whose span begins at `low`."""
        if self.first:
            return np.zeros_like(low)
        if self.stride is not None:
            return np.minimum(low, q % self.stride)
        return np.minimum(low, self.chunk - self.last) if self.last and self.chunk is not None else low

    def below(self, q: Any, low: Any) -> Any:
        """How many visible places lie below the span of each place in q, which begins at `low`."""
        if self.stride is not None:
            return q // self.stride - (q - low) // self.stride
        if self.last and self.chunk is not None:
            return q // self.chunk * self.last
        return np.minimum(low, self.first)

    def pairs(self, new: int, seen: int, prefix: int = 0) -> int:
        """Visible (query, key) pairs when `new` tokens arrive after `seen` others; exact."""
        q = np.arange(seen, seen + new, dtype=np.int64)
        low, high = self.spans(q, seen + new, prefix)
        return int((high - low + 1 + self.below(q, low)).sum())

    def __and__(self, other: Sees) -> Sees:
        """Seen by both."""
        if (self.first or other.first) and self.first != other.first:
            raise ValueError("two rules with different `first` have no single form")
        if None not in (self.chunk, other.chunk) and self.chunk != other.chunk:
            raise ValueError(f"chunks of {self.chunk} and {other.chunk} have no single form")
        if self != other and (self.scattered or other.scattered):
            raise ValueError("a rule with `stride` or `last` and another rule have no single form")
        causal = self.causal or other.causal
        bands = [b for b in (self.band, other.band) if b is not None]
        windows = [w for w in (self.window, other.window) if w is not None]
        if causal and bands:
            windows, bands = [*windows, *(b[0] + 1 for b in bands)], []
        return Sees(
            causal=causal,
            window=min(windows) if windows else None,
            chunk=self.chunk if self.chunk is not None else other.chunk,
            band=(min(b[0] for b in bands), min(b[1] for b in bands)) if bands else None,
            first=self.first,
            prefix=causal and all(rule.prefix for rule in (self, other) if rule.causal),
            stride=self.stride,
            last=self.last,
        )

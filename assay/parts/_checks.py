"""What several parts refuse in the same words."""

from __future__ import annotations

from collections.abc import Mapping

from assay.spec.base import NormSpec, Site


def whole_heads(heads: int, head_dim: int | None, site: Site) -> None:
    """ValueError where heads whose size is not said would not divide the input."""
    if head_dim is None and site.d_in % heads:
        raise ValueError(f"d_model ({site.d_in}) is not a multiple of `heads` ({heads}); give `head_dim`")


def token_by_token(name: str, norm: NormSpec | None) -> None:
    """ValueError for a norm inside a part, in the field `name`, that mixes tokens."""
    if norm is not None and norm.refuses:
        raise ValueError(f"`{name}` {norm.kind_name()!r} mixes tokens; accepted: rmsnorm, layernorm")


def halved(count: int, what: str) -> Mapping[str, str]:
    """The refusal of `split` by a part that is cut along `count` things, where they are odd; `what`: `3 heads are`."""
    return {"split": f"{what} not cut in two"} if count % 2 else {}

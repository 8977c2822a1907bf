"""Which weights are held in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator

from assay.ops.packed import TILE
from assay.spec.base import PartSpec, Site


def packed(part: PartSpec, site: Site, prefix: str = "") -> Iterator[str]:
    """The weights of a part that are held in 8 or 4 bits (`passes.quantise`): of its linear maps and those of the parts
    inside it with as many outputs as a tile, but for maps that decide where to look; its experts; and a token table."""
    if part.slot in ("routers", "selectors"):
        return
    if part.slot == "embeds":
        yield from (f"{prefix}{name}" for name in ("weight",) if name in part.own(site))
    yield from (f"{prefix}{name}.weight" for name, fan in part.linears(site).items() if fan.d_out >= TILE)
    for name, weight in part.own(site).items():
        if weight.role == "expert" and len(weight.shape) == 3 and weight.shape[1] >= TILE:
            yield f"{prefix}{name}"
    for name, (child, place) in part.children(site).items():
        yield from packed(child, place, f"{prefix}{name}.")

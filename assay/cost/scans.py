"""What a recurrence keeps for its backward pass, counted where it runs without memory: on torch's meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from assay.cost.bill import Placed
from assay.ops.here import Here
from assay.ops.scan import elementwise
from assay.ops.state import Stateless
from assay.ops.step import rows_step
from assay.parts.base import Part
from assay.spec.base import PartSpec, PositionSpec, Site

KINDS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def is_recurrence(one: Placed) -> bool:
    """A mixer, or a convolution before one, that remembers a state of fixed size: how its scan is computed decides what
    is kept, and no table of its linear maps tells."""
    return one.part.slot == "mixers" and bool(one.state) and all(field.per == "sequence" for field in one.state)


def recurrent_bytes(one: Placed, positions: Mapping[str, PositionSpec], grid: tuple[int, int], dtype: str) -> int:
    """Of (rows, tokens of each), with what its linear maps keep. Counted on two and three short rows, the last chunk of
    which is as full as the long rows': another row and another chunk keep as much as the one before (the first of
    either may need no copy where the others do). To the byte for scans in chunks; elementwise ones pad to whole runs,
    and complex ones copy more on a CPU.
    """
    rows, tokens = grid
    chunk = int(getattr(one.part, "chunk", elementwise.CHUNK))
    short = tokens if tokens <= 4 * chunk else 2 * chunk + tokens % chunk
    name = getattr(one.part, "position", None)
    # Layers that are alike are counted once; a rule for linears goes by names.
    site = one.site if one.site.linears else replace(one.site, name="part", layer=0)
    scan = Scan(one.part, site, None if name is None else (name, positions[name]), KINDS[dtype])

    def row(count: int) -> int:
        kept = watched(scan, count, short)
        if short == tokens:
            return kept
        return kept + (tokens - short) // chunk * (watched(scan, count, short + chunk) - kept)

    return row(rows) if rows <= 2 else row(2) + (rows - 2) * (row(3) - row(2))


@dataclass(frozen=True)
class Scan:
    """A part at its site, with the position scheme that it names, in a dtype."""

    part: PartSpec
    site: Site
    scheme: tuple[str, PositionSpec] | None
    dtype: str


@lru_cache(maxsize=256)
def watched(scan: Scan, rows: int, tokens: int) -> int:
    """Bytes that autograd saves when the part reads these rows; each storage once, weights not."""
    kind, site, found = getattr(torch, scan.dtype), scan.site, dict[int, int]()
    alive = []  # an address says which storage only while the storage lives

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found.setdefault(storage._cdata, storage.nbytes())
        alive.append(storage)
        return tensor

    with torch.device("meta"):
        named = [] if scan.scheme is None else [scan.scheme]
        schemes = {name: spec.build(replace(site, name=name, linears=())) for name, spec in named}
        mixer = scan.part.build(site).to(kind).train()
        mixer.bind(schemes)
        step = rows_step(torch.zeros(rows, tokens, dtype=torch.long))
        state = Stateless(scan.part.state(site), kind, torch.device("meta"))
        parts = [m for m in (*mixer.modules(), *schemes.values()) if isinstance(m, Part)]
        step = step.with_(tables={m.name: m.prepare(step, state) for m in parts if m.prepare_key() is not None})
        x = torch.empty(rows * tokens, site.d_in, dtype=kind, requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mixer(x, step, Here(site.name, {site.name: state}, {"embed": x}, {}, frozenset()))
    return sum(found.values()) - sum(found.get(p.untyped_storage()._cdata, 0) for p in mixer.parameters())

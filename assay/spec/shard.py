"""How a model is dealt out to the ranks of parallel training: which weights are cut, where, along which axis. No torch.

A part says with `split` along which dimension each of its weights is cut, and with `pieces` for which axes, and into
how many at most. Everything else follows: what a rank holds, and whose gradients are sums over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from assay.spec.base import PartSpec, Site, StateField, Weight
from assay.spec.model import ModelSpec

TABLE = "embed.weight"


@dataclass(frozen=True)
class Cut:
    """Rank r of n along `axis` holds piece r of n equal ones along dimension `dim`. copies: of so many neighbours, each
    the same one. sections: sizes of what stands side by side along `dim`; a piece has one of each."""

    axis: str
    dim: int
    copies: int = 1
    sections: tuple[int, ...] = ()

    def place(self, rank: int, ranks: int) -> tuple[int, int]:
        """Which piece a rank holds, and of how many."""
        return rank // self.copies, ranks // self.copies


@dataclass(frozen=True)
class Deal:
    """What of a model is dealt out. cuts: by dotted weight name; a weight that is not named is whole on every rank.

    partial: weights that are whole on every `tensor` rank although they stand in a part that is cut: each rank's
    gradient is that of its own heads or channels, and their sum is the gradient.
    """

    cuts: Mapping[str, Cut] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()

    def local(self, name: str, weight: Weight, sizes: Mapping[str, int]) -> Weight:
        """What a rank allocates of this weight."""
        cut = self.cuts.get(name)
        if cut is None:
            return weight
        return replace(weight, shape=piece_shape(weight.shape, cut.dim, cut.place(0, sizes[cut.axis])[1]))


def piece_shape(shape: tuple[int, ...], dim: int, ranks: int) -> tuple[int, ...]:
    """The shape of one of `ranks` equal pieces along a dimension."""
    return tuple(n // ranks if i == dim else n for i, n in enumerate(shape))


def cut_weights(part: PartSpec, site: Site, axis: str, ranks: int) -> dict[str, Cut]:
    """Which of a part's weights are cut along an axis, and how: along `tensor` all that say `split` (of [out, in], 0:
    by column, by head, or a vocabulary's rows; 1: by row), along `expert` those of the part itself, whose first
    dimension is the experts. All others are whole on every rank."""
    if not part.pieces(site).get(axis):
        return {}
    table = part.own(site) if axis == "expert" else part.weights(site)
    few = part.copied(site) if axis == "tensor" else {}
    return {
        name: Cut(axis, w.split, copies(few.get(name.partition(".")[0], ranks), ranks), w.sections)
        for name, w in table.items()
        if w.split is not None
    }


def copies(pieces: int, ranks: int) -> int:
    """How many ranks hold the same one of what comes in so many pieces."""
    return max(1, ranks // pieces)


def fits(part: PartSpec, site: Site, axis: str, ranks: int) -> bool:
    """Whether so many ranks can hold equal pieces of a part, or of what they copy equally many."""
    few = part.copied(site).values() if axis == "tensor" else ()
    return part.pieces(site)[axis] % ranks == 0 and all(ranks % n == 0 or n % ranks == 0 for n in few)


def refuse(part: PartSpec, site: Site, axis: str, ranks: int) -> None:
    """ValueError where the part cannot be dealt out to so many ranks."""
    if part.slot in ("norms", "residuals"):
        return
    what = f"{site.name}: {part.slot[:-1]} {part.kind_name()}: {axis}={ranks} is not supported"
    if axis not in part.pieces(site):
        reason = part.refusals().get("split") if axis == "tensor" else None
        raise ValueError(f"{what}{f', since {reason}' if reason else ''}; accepted: {axis}=1")
    count = part.pieces(site)[axis]
    if not fits(part, site, axis, ranks):
        accepted = ", ".join(str(n) for n in range(1, count + 1) if fits(part, site, axis, n))
        raise ValueError(f"{what}: it has {count} pieces; accepted: {axis} in {accepted}")


def deal(spec: ModelSpec, sizes: Mapping[str, int], sequence: bool = False) -> Deal:
    """The weights that ranks of these axes hold pieces of. sequence: between the parts that are cut, `tensor` ranks
    have a part of the tokens each, so that the gradients of norms there are partial as well. ValueError, by name, for
    what cannot be dealt out so."""
    cuts: dict[str, Cut] = {}
    partial: set[str] = set()
    tensor, expert = sizes.get("tensor", 1), sizes.get("expert", 1)
    for site, part in owned(spec):
        if tensor > 1:
            refuse(part, site, "tensor", tensor)
            dims = cut_weights(part, site, "tensor", tensor)
            cuts |= {f"{site.name}.{name}": cut for name, cut in dims.items()}
            between = sequence and site.name.startswith("blocks.") and part.slot in ("norms", "residuals")
            if between or (dims and part.slot in ("mixers", "ffns")):
                partial |= {f"{site.name}.{name}" for name in part.weights(site).keys() - dims.keys()}
        if expert > 1 and part.pieces(site).get("expert"):
            refuse(part, site, "expert", expert)
            dims = cut_weights(part, site, "expert", expert)
            cuts |= {f"{site.name}.{name}": cut for name, cut in dims.items()}
    if expert > 1 and not any(cut.axis == "expert" for cut in cuts.values()):
        raise ValueError(f"parallel.expert: {expert}; the model has no experts; accepted: 1")
    return Deal(cuts, frozenset(partial))


def spans(layers: int, stages: int) -> list[range]:
    """The layers of each stage of a pipeline, as even as they can be dealt out. ValueError for more stages than
    layers."""
    if stages > layers:
        raise ValueError(f"parallel.pipeline: {stages}; the model has {layers} layers: accepted: 1 to {layers}")
    return [range(layers * s // stages, layers * (s + 1) // stages) for s in range(stages)]


def tied(spec: ModelSpec) -> bool:
    """Whether the head reads the embedding's table."""
    return bool(getattr(spec.head, "tie", False))


def stage_of(name: str, spec: ModelSpec, stages: int) -> int:
    """Which stage of a pipeline runs a part, by its dotted name, and has its weights: layers as `spans` says, the last
    stage the final norm and the head, the first one all else. The last one has a tied table beside that."""
    first, *rest = name.split(".")
    if first == "blocks":
        return next(s for s, span in enumerate(spans(spec.layers, stages)) if int(rest[0]) in span)
    return stages - 1 if first in ("final_norm", "head") else 0


def owned(spec: ModelSpec) -> Iterator[tuple[Site, PartSpec]]:
    """Every part that is dealt out by itself, at the site that its weights are named by; once for shared blocks. A
    network inside another one that is whole on every `tensor` rank (the shared experts of a mixture) is one of them."""
    for site, part in spec.parts():
        if site.name == "embed":
            yield replace(site, d_in=spec.vocab, linears=()), part
        elif site.name == "head":
            yield replace(site, d_out=spec.vocab, linears=()), part
        elif not site.name.startswith("blocks.") or spec.sources[site.layer] == site.layer:
            yield site, part
            inside = part.children(site).values() if part.slot == "ffns" and not part.pieces(site).get("tensor") else ()
            yield from ((place, child) for child, place in inside if child.slot == "ffns")


def cut_fields(fields: tuple[StateField, ...], ranks: int, few: Mapping[str, int]) -> tuple[StateField, ...]:
    """What one of `ranks` tensor ranks remembers of a part that is cut; few: what the part says with `copied`."""
    return tuple(
        f if f.split is None else replace(f, shape=piece_shape(f.shape, f.split, min(ranks, few.get(f.name, ranks))))
        for f in fields
    )

"""What importers get wrong about RoPE, as changes to try: its scaling, how much of a head turns, its pairs' layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from assay.hub.config import SCALINGS
from assay.hub.family import owned
from assay.hub.rules import Pairs
from assay.hub.rules import Place as Spot
from assay.model.lm import weight_table
from assay.spec.load import dump
from assay.spec.model import ModelSpec

Weights = Mapping[str, Tensor]
Numbers = Mapping[str, float]
LISTED = "longrope"  # its factors are lists, and only numbers of a configuration are known here
SHARES = ("partial_rotary_factor", "rotary_pct")
TURNED = ("q.weight", "q.bias", "k.weight", "k.bias", "q_norm.weight", "k_norm.weight")


class Change(NamedTuple):
    """Of the spec (dotted paths) and of weights. step: where it acts."""

    step: str
    cause: str
    changes: dict[str, Any]
    weights: dict[str, Tensor]


class Turned(NamedTuple):
    """A mixer whose queries and keys a scheme turns. spots: its weights by name, as rules of import see them."""

    name: str
    scheme: str
    size: int
    dim: int | None
    spots: dict[str, Spot]

    @property
    def step(self) -> str:
        """`blocks.1.mixer` -> `mixer.q`."""
        return f"{self.name.split('.', 2)[2]}.q"

    def relaid(self, own: Weights, dim: int | None) -> dict[str, Tensor]:
        """The weights of a file with neighbours as pairs that were read for another number of turned rows."""
        before, after = Pairs("", dim=self.dim), Pairs("", dim=dim)
        return {n: after.read(before.write([own[n]], spot), spot)[0] for n, spot in self.spots.items()}


def changes(spec: ModelSpec, own: Weights, numbers: Numbers) -> Iterator[Change]:
    """own: the weights of one layer by name. numbers: of the configuration, by dotted key."""
    mixers = list(turned(spec, own))
    for scheme in dict.fromkeys(m.scheme for m in mixers):
        yield from scaled(spec, scheme, numbers)
        yield from partial(scheme, [m for m in mixers if m.scheme == scheme], own, numbers)
    for mixer in mixers:
        yield from layouts(mixer, own)


def turned(spec: ModelSpec, own: Weights) -> Iterator[Turned]:
    table = weight_table(spec)
    for name, (part, site) in owned(spec):
        scheme, size = getattr(part, "position", None), getattr(part, "size", None)
        names = [f"{name}.{x}" for x in TURNED if f"{name}.{x}" in own]
        if not names or not isinstance(scheme, str) or not callable(size):
            continue
        if not hasattr(spec.positions[scheme], "dim"):  # a scheme that turns nothing
            continue
        spots = {n: Spot((n,), (table[n].shape,), part, site) for n in names}
        yield Turned(name, scheme, size(site), getattr(spec.positions[scheme], "dim", None), spots)


def scaled(spec: ModelSpec, scheme: str, numbers: Numbers) -> Iterator[Change]:
    """Without the scaling, or with one that the configuration's numbers spell."""
    path, here = f"positions.{scheme}.scaling", dump(spec)["positions"][scheme].get("scaling")
    for other in (None, *scalings(numbers)):
        if other != here:
            yield Change("mixer.q", f"{path} is {spelt(here)} here; {spelt(other)} fits", {path: other}, {})


def scalings(numbers: Numbers) -> Iterator[dict[str, Any]]:
    """Every kind of scaling with each factor that stands among the numbers, and with what stands beside it."""
    longest = [value for key, value in numbers.items() if key.endswith("max_position_embeddings")]
    for key in (key for key in numbers if key.rpartition(".")[2] == "factor"):
        for kind, names in reversed(SCALINGS.items()):
            beside = {ours: numbers.get(key.removesuffix("factor") + theirs) for ours, theirs in names.items()}
            found = {ours: value for ours, value in beside.items() if value is not None}
            if kind != "linear" and longest:
                found.setdefault("original", longest[-1])
            if kind != LISTED:
                yield {"kind": kind, **found}


def spelt(scaling: Mapping[str, Any] | None) -> str:
    """`linear (factor 4)`."""
    if scaling is None:
        return "absent"
    values = (f"{key} {value:g}" for key, value in scaling.items() if isinstance(value, int | float))
    return f"{scaling['kind']} ({', '.join(values)})"


def partial(scheme: str, mixers: list[Turned], own: Weights, numbers: Numbers) -> Iterator[Change]:
    """Another number of a head's rows turned, without and with the rows where such a file would have them."""
    first, path = mixers[0], f"positions.{scheme}.dim"
    for size in sizes(first.size, first.dim or first.size, numbers):
        dim = None if size == first.size else size
        told = f"{path} is {first.dim or 'absent'} here; {dim or 'absent'} fits"
        yield Change(first.step, told, {path: dim}, {})
        moved = {name: w for mixer in mixers for name, w in mixer.relaid(own, dim).items()}
        yield Change(first.step, f"{told}, with the rows of queries and keys read for it", {path: dim}, moved)


def sizes(head: int, here: int, numbers: Numbers) -> list[int]:
    """Numbers of rows: those that the configuration's numbers say, and eighths of a head."""
    said = [head * v for k, v in numbers.items() if k.rpartition(".")[2] in SHARES]
    said += [v for k, v in numbers.items() if k.endswith(("rotary_dim", "rope_dim"))]
    tried = [int(n) for n in said] + [head * i // 8 for i in range(8, 0, -1)]
    return [n for n in dict.fromkeys(tried) if 2 <= n <= head and n % 2 == 0 and n != here]


def layouts(mixer: Turned, own: Weights) -> Iterator[Change]:
    """Queries and keys with their pairs as neighbours, or back from there to halves."""
    rule = Pairs("", dim=mixer.dim)
    for back, told in (
        (False, "pairs neighbours, and they were read as halves"),
        (True, "pairs halves, and they were read as neighbours"),
    ):
        act = rule.write if back else rule.read
        moved = {n: act([own[n]], spot)[0] for n, spot in mixer.spots.items()}
        yield Change(mixer.step, f"RoPE's layout: the file {told}", {}, moved)

"""Whether an imported model computes what the reference does, quantity by quantity, and if not, where it parts and why.

A reference is a mapping of tensors (`assay.measure.reference`). What it does not have is not compared, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from assay.cache import Size
from assay.engine.runner import Runner, check_context, check_continues, right_padded
from assay.hub.live import ENCODER
from assay.hub.load import Imported
from assay.measure.causes import Found, Search
from assay.measure.isolate import Place, alone, places, relative, sides
from assay.measure.reference import PADS, Reference
from assay.model.lm import LM
from assay.ops.step import Step, rows_step
from assay.spec.model import ModelSpec

TOLERANCE = 1e-4
"""max |ours - theirs| / max |theirs| in float32: above rounding, below what any wrong field does."""
CHUNK = 32  # tokens of a prompt that one step of the greedy run takes, so that prefill in pieces is compared too

Inside = Callable[[int, str], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """One quantity: `logits`, `hidden.3`, `greedy_ids` (the share of tokens that differ), ..."""

    quantity: str
    max_rel_diff: float
    match: bool


@dataclass(frozen=True)
class Divergence:
    """Where the first difference is made. layer: of a block. step: inside it, as far as it is known; `enc.` stands
    before one of an encoder-decoder's encoder. cause: null where no trial makes the difference vanish."""

    layer: int | None
    step: str
    max_rel_diff: float
    cause: str | None


@dataclass(frozen=True)
class Report:
    """What was compared, what could not be and why, and the first difference."""

    rows: tuple[Row, ...]
    absent: tuple[str, ...]
    first_divergence: Divergence | None

    @property
    def match(self) -> bool:
        return all(row.match for row in self.rows)

    @property
    def max_rel_diff(self) -> float:
        return max(row.max_rel_diff for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        return {"match": self.match, "max_rel_diff": self.max_rel_diff, **asdict(self)}


def compare(
    imported: Imported,
    reference: Reference,
    numbers: Mapping[str, float] | None = None,
    inside: Inside | None = None,
    told: Callable[[int], None] | None = None,
) -> Report:
    """Run the model on the reference's input and compare everything that both have.

    numbers: of the configuration, for the search of a cause. inside: the reference's values within a block, by its
    layer and the prefix of its stack, where it can be asked for them (`assay.hub.live`). told: called with the number
    of trials done.
    """
    model, step = imported.model, step_of(reference)
    rows, absent = list(forward_rows(model, step, reference)), []
    for part in (padded_rows, greedy_rows):
        try:
            rows += part(model, reference)
        except ValueError as error:
            absent.append(str(error))
    absent += [f"{name}: not in the reference" for name in expected(imported) if name not in reference]
    report = Report(tuple(rows), tuple(absent), None)
    if report.match:
        return report
    for side in sides(model, step, reference):
        search = Search(side.model, side.step, side.reference, told)
        if (found := diverges(search, numbers or {}, inside, ENCODER if side.named else "")) is not None:
            cause = f"in the encoder, {found.cause}" if side.named and found.cause else found.cause
            found = replace(found, step=side.named + found.step, cause=cause)
            return replace(report, first_divergence=found)
    first = next(r for r in report.rows if not r.match)
    cause = elsewhere(first.quantity, report)
    return replace(report, first_divergence=Divergence(None, first.quantity, first.max_rel_diff, cause))


def step_of(reference: Reference) -> Step:
    """The uncached pass of a reference: an encoder-decoder's reads a source, and tokens of its own."""
    source = rows_step(reference["input_ids"])
    if "decoder_input_ids" not in reference:
        return source
    return rows_step(reference["decoder_input_ids"], encode=source)


def expected(imported: Imported) -> list[str]:
    spec = imported.spec
    names = [*taps_of(spec), *(["logits"] if spec.head is not None else [])]
    try:
        check_continues(spec)
    except ValueError:
        return [*names, f"{PADS[1]}.logits"]
    pads = PADS if spec.encoder is None else PADS[1:]
    return [*names, *(f"{pad}.logits" for pad in pads), "greedy_ids", "greedy_logits"]


def taps_of(spec: ModelSpec, named: str = "", prefix: str = "") -> dict[str, str]:
    """The tap of every quantity inside the model, the encoder's (`enc.`) first."""
    found = {} if spec.encoder is None else taps_of(spec.encoder, "enc.", f"{prefix}encoder.")
    found |= {f"{named}hidden.{i}": f"{prefix}blocks.{i}.in" for i in range(spec.layers)}
    found[f"{named}hidden.{spec.layers}"] = f"{prefix}blocks.{spec.layers - 1}.out"
    return found | {f"{named}final": f"{prefix}final"}


def row(quantity: str, ours: Tensor, theirs: Tensor) -> Row:
    error = relative(ours, theirs)
    return Row(quantity, error, error <= TOLERANCE)


@torch.no_grad()
def forward_rows(model: LM, step: Step, reference: Reference) -> Iterator[Row]:
    """Hidden states, final features and logits of one uncached pass."""
    taps = taps_of(model.spec)
    wanted = frozenset(taps.values())
    encode = step.encode.with_(listen=wanted) if step.encode is not None else None
    out = model(step.with_(listen=wanted, encode=encode))
    for quantity, tap in taps.items():
        if quantity in reference:
            yield row(quantity, out.taps[tap], reference[quantity].flatten(0, 1))
    if model.spec.head is not None:
        yield row("logits", out.logits, reference["logits"].flatten(0, -2))


@torch.no_grad()
def padded_rows(model: LM, reference: Reference) -> Iterator[Row]:
    """Rows of unequal length in one batch: only real tokens are compared, wherever the reference put its padding."""
    for pad in PADS:
        if f"{pad}.logits" not in reference:
            continue
        ids, keep = reference[f"{pad}.input_ids"], reference[f"{pad}.attention_mask"].bool()
        texts = [row_ids[mask].tolist() for row_ids, mask in zip(ids, keep, strict=True)]
        lengths = [len(text) for text in texts]
        step = right_padded(texts, [0] * len(texts), lengths, ids.device).with_(emit=None)
        if model.spec.encoder is not None:
            out = model(rows_step(reference[f"{pad}.decoder_input_ids"], encode=step))
            yield row(f"{pad}.logits", out.logits, reference[f"{pad}.logits"].flatten(0, 1))
            continue
        out = model(step)
        each = model.spec.head is None or model.spec.head.names_tokens
        ours, theirs = out.logits, reference[f"{pad}.logits"]
        yield row(f"{pad}.logits", ours[step.seq >= 0] if each else ours, theirs[keep] if each else theirs)


@torch.no_grad()
def greedy_rows(model: LM, reference: Reference) -> Iterator[Row]:
    """The continuation through the engine's cache, fed with the reference's tokens so that every step is compared.

    A token counts as another only where the reference's two best are further apart than the tolerance.
    """
    if "greedy_ids" not in reference or "greedy_logits" not in reference:
        return
    check_continues(model.spec)
    ids, said, sources = reference["input_ids"], reference["greedy_ids"], None
    if model.spec.encoder is not None:  # the reply begins with the decoder's first token
        ids, sources = reference["decoder_input_ids"][:, :1], ids
    check_context(model.spec, ids.shape[1], said.shape[1])
    ours = continued(model, ids, said, sources)
    theirs = reference["greedy_logits"].to(ours.dtype)
    best = theirs.topk(2, -1).values
    sure = best[..., 0] - best[..., 1] > 2 * TOLERANCE * theirs.abs().max()
    share = float(((ours.argmax(-1) != said) & sure).float().mean())
    yield row("greedy_logits", ours, theirs)
    yield Row("greedy_ids", share, share == 0.0)


def continued(
    model: LM, ids: Int[Tensor, "R T"], said: Int[Tensor, "R n"], sources: Int[Tensor, "R S"] | None = None
) -> Tensor:
    """[R, n, V]: logits before each token of `said`, one cached step at a time; sources: what an encoder reads."""
    count, length = ids.shape
    texts = [()] * count if sources is None else sources.tolist()
    runner = Runner(model, Size(count, length + said.shape[1], min(CHUNK, length), len(texts[0])))
    slots = [runner.open(length + said.shape[1], text) for text in texts]
    logits = [runner.feed(slots, ids.tolist())]
    for column in said[:, :-1].unbind(1):
        logits.append(runner.feed(slots, column[:, None].tolist()))
    return torch.stack(logits, 1)


def diverges(search: Search, numbers: Mapping[str, float], inside: Inside | None, stack: str) -> Divergence | None:
    """The first place of a stack whose own output differs when it is given the reference's input, and a cause."""
    model, reference = search.model, search.reference
    ask = (lambda layer: inside(layer, stack)) if inside is not None else None
    made = alone(model, search.step, reference).outputs
    for place in places(model.spec):
        known = place.wanted in reference and (place.given is None or place.given in reference)
        if not known or place.name not in made:
            continue
        error = relative(made[place.name], reference[place.wanted].flatten(0, -2))
        if error > TOLERANCE / 10:
            return explained(search, place, error, numbers, ask)
    return None


def elsewhere(quantity: str, report: Report) -> str | None:
    """What is known where no single place differs."""
    if quantity in [f"{pad}.logits" for pad in PADS]:
        return "the batch without padding agrees: sequences of unequal length are told apart wrongly"
    if quantity.startswith("greedy"):
        return "the pass without a cache agrees: what decoding reads from the cache is not what prefill computes"
    if any(row.quantity.startswith("hidden.") for row in report.rows):
        return "each place agrees when it is given the reference's input: small differences add up"
    return None


def explained(
    search: Search,
    place: Place,
    error: float,
    numbers: Mapping[str, float],
    inside: Callable[[int], Mapping[str, Tensor]] | None,
) -> Divergence:
    model = search.model
    found: Found | None = search.find(place, error, TOLERANCE / 10, numbers)
    cause = found.cause if found is not None else None
    if place.layer is not None and inside is not None:
        ours = alone(model, search.step, search.reference, place.layer).inside
        step = first_step(ours, inside(place.layer), raw_keys(model.spec, place.layer))
        if step is not None:
            return Divergence(place.layer, step[0], step[1], cause)
    default = {"embed": "in", "final_norm": "final", "head": "logits"}.get(place.name, "out")
    return Divergence(place.layer, found.step if found is not None else default, error, cause)


def raw_keys(spec: ModelSpec, layer: int) -> frozenset[str]:
    """Keys of a block that are turned only when they are read, and so are not what the reference attends to."""
    names = ((site, getattr(branch.part, "position", None)) for site, _, branch in spec.branches(layer))
    raw = [
        site.name for site, name in names if name in spec.positions and getattr(spec.positions[name], "reads", False)
    ]
    return frozenset(f"{name.split('.', 2)[2]}.k" for name in raw)


def first_step(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], skip: frozenset[str] = frozenset()
) -> tuple[str, float] | None:
    """The first step inside a block that differs: norms, then what each mixer and each feed-forward part does.

    Queries and keys that give the same shares are no difference: only their products count.
    """
    errors = {
        name: step_error(name, ours[name], theirs[name])
        for name in ordered(ours)
        if name in theirs and name not in skip
    }
    for name, error in errors.items():
        part, _, leaf = name.rpartition(".")
        excused = leaf in ("q", "k") and errors.get(f"{part}.scores", 1.0) <= TOLERANCE / 10
        if error > TOLERANCE / 10 and not excused:
            return name, error
    return None


def step_error(name: str, ours: Tensor, theirs: Tensor) -> float:
    """Choices of experts are sets: the share of tokens that choose others. Anything else: see `relative`."""
    if name.endswith(".choice"):
        return float((ours.sort(-1).values != theirs.sort(-1).values).any(-1).float().mean())
    return relative(ours.flatten(1), theirs.flatten(1))


def ordered(names: Mapping[str, Tensor]) -> list[str]:
    """In the order of computation: within a part its taps before its output, its norms before and after."""
    steps = ("router.logits", "router.choice", "q", "k", "scores", "mix")
    parts = [name for name in names if "." not in name and not name.startswith("residual")]
    made = [n for part in parts for n in (*(f"{part}.{step}" for step in steps), part)]
    return [name for name in made if name in names]

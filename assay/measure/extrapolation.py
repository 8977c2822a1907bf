"""Loss beyond the training length, and under other position schemes with the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from assay.data.loader import Batch
from assay.measure.subject import Subject, prefix
from assay.spec.load import change

SECONDS = 1.5
BASE = "base"
Row = dict[str, Any]


def measure(
    subject: Subject,
    *,
    ratios: Sequence[float] = (1, 1.25, 1.5, 2, 4, 8),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    windows: int = 32,
    tokens: int = 65_536,
) -> list[Row]:
    """Rows: variant, length, ratio, loss_nats (all targets of a window), last_nats (its last max(8, T / 8)).

    The same windows of running validation text at every length, each read from its beginning: at most `windows` of
    them, and `tokens` tokens, at the longest. variants: name -> dotted changes of the model's spec that keep its
    weights, such as `model.positions.main.scaling`. A length that the model or the text does not reach, and a change
    that this model does not have, give a row without a loss and with a `reason`.
    """
    lengths = {length_of(subject, ratio): float(ratio) for ratio in sorted(ratios)}
    reached = [n for n in lengths if n < len(subject.text.tokens)]
    if not reached:
        raise ValueError(
            f"extrapolation: the validation text has {len(subject.text.tokens)} tokens, too few for a window"
        )
    batch = subject.joined(max(reached), tokens, windows)
    rows = []
    for name, changes in {BASE: {}, **(variants or {})}.items():
        try:
            tried = subject.variant(change(subject.spec, changes, name)) if changes else subject
        except ValueError as error:
            rows += [row(name, n, ratio, reason=f"refused: {error}") for n, ratio in lengths.items()]
            continue
        rows += variant_rows(name, tried, lengths, batch)
    return rows


def length_of(subject: Subject, ratio: float) -> int:
    if ratio <= 0 or round(ratio * subject.length) < 1:
        raise ValueError(f"extrapolation: ratios: {ratio}; accepted: above 0, and at least one token")
    return round(ratio * subject.length)


def variant_rows(name: str, subject: Subject, lengths: Mapping[int, float], batch: Batch) -> list[Row]:
    longest, tail = batch.grid[1], max(8, subject.length // 8)
    why = {n: f"the validation text has no window of {n} tokens" for n in lengths if n > longest}
    why |= {n: reason for n in lengths if (reason := subject.refusal(n)) is not None}
    found = losses(subject, batch, [n for n in lengths if n not in why])
    rows = []
    for length, ratio in lengths.items():
        if length in why:
            rows.append(row(name, length, ratio, reason=why[length]))
            continue
        nats = found[length].double()
        rows.append(row(name, length, ratio, float(nats.mean()), float(nats[:, -tail:].mean())))
    return rows


def row(
    variant: str, length: int, ratio: float, loss: float | None = None, last: float | None = None, reason: str = ""
) -> Row:
    made: Row = {"variant": variant, "length": length, "ratio": ratio, "loss_nats": loss, "last_nats": last}
    return made | ({"reason": reason} if reason else {})


def losses(subject: Subject, batch: Batch, lengths: Sequence[int]) -> dict[int, Tensor]:
    """length -> [R, length]. One pass serves all lengths where a prefix of a longer row is a shorter row."""
    if not lengths:
        return {}
    if by_length(subject):
        return {n: subject.losses(prefix(batch, n)) for n in lengths}
    whole = subject.losses(prefix(batch, max(lengths)))
    return {n: whole[:, :n] for n in lengths}


def by_length(subject: Subject) -> bool:
    """Whether what a model says of a token may depend on the length of the row: schemes that turn keys when they are
    read may plan for it, and a layer that is not causal sees the rest of the row."""
    late = any(scheme.reads for scheme in subject.spec.positions.values())
    return late or any("causal" in part.refusals() for _, part in subject.spec.parts())

"""Log probabilities of given continuations: sequences of any length, many in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from assay.model.lm import LM
from assay.ops.precision import high
from assay.ops.step import Step
from assay.train.evaluate import LOGITS

Ids = tuple[int, ...]
Row = tuple[Ids, Ids]
"""What a model reads, and the tokens that follow its last places: target j comes after inputs[n - targets + j]."""


def packed(rows: Sequence[Ids], device: torch.device | str = "cpu") -> tuple[Step, list[int]]:
    """A step that reads every sequence from its beginning, and where on the flat axis each one begins.

    Rows of the grid are as long as the longest sequence and hold as many as fit (first fit); what is left is padding.
    Length-dependent position schemes plan for each sequence's own length, as if it were alone.
    """
    width = max(map(len, rows))
    places = first_fit([len(ids) for ids in rows], width)
    cells = len(places) * width
    ids, seq, index = (torch.full((cells,), fill) for fill in (0, -1, 0))
    begins, order = [0] * len(rows), [i for place in places for i in place]
    number = {i: at for at, i in enumerate(order)}
    for row, place in enumerate(places):
        at = row * width
        for i in place:
            begins[i], end = at, at + len(rows[i])
            ids[at:end], seq[at:end], index[at:end] = torch.tensor(rows[i]), number[i], torch.arange(end - at)
            at = end
    starts = torch.tensor([*(begins[i] for i in order), cells], device=device)
    lengths = torch.tensor([len(rows[i]) for i in order], device=device)
    ids, seq, index = ids.to(device), seq.to(device), index.to(device)
    grid = (len(places), width)
    past = torch.zeros_like(lengths)
    return Step({"ids": ids}, seq, index, index, starts, past, lengths, grid, 0, width, width), begins


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which sequences share a row: each goes into the first one that has room for it."""
    places: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        row = next((row for row, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            places.append([])
            room.append(width)
        places[row].append(i)
        room[row] -= length
    return places


def score(
    model: LM, rows: Sequence[Row], batch: int = 16, told: Callable[[int, int], None] | None = None
) -> list[tuple[float, bool]]:
    """For each row the log probability of its targets in nats, and whether each of them is the likeliest token.

    Rows that read the same are computed once. batch: sequences in a step. told(done, rows) hears of the progress.
    ValueError for a row without targets or with more of them than it reads, for an id that the model does not have,
    and for logits that are not numbers.
    """
    check(model, rows)
    members: dict[Ids, list[int]] = {}
    for i, (ids, _) in enumerate(rows):
        members.setdefault(ids, []).append(i)
    spans = {ids: max(len(rows[i][1]) for i in same) for ids, same in members.items()}
    found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    done = 0
    for piece in pieces(spans, batch, LOGITS // model.spec.vocab):
        asked = [[rows[i][1] for i in members[ids]] for ids in piece]
        for ids, scores in zip(piece, together(model, piece, asked), strict=True):
            for i, one in zip(members[ids], scores, strict=True):
                found[i] = one
        done += sum(map(len, asked))
        if told is not None:
            told(done, len(rows))
    return found


def check(model: LM, rows: Sequence[Row]) -> None:
    vocab = model.spec.vocab
    for ids, targets in rows:
        if not 1 <= len(targets) <= len(ids):
            raise ValueError(f"{len(targets)} tokens to score after {len(ids)}; accepted: 1 to as many as are read")
        if strange := [i for i in (*ids, *targets) if not 0 <= i < vocab]:
            raise ValueError(f"token {strange[0]}; this model has ids 0 to {vocab - 1}")


def pieces(spans: dict[Ids, int], batch: int, room: int) -> Iterator[list[Ids]]:
    """Up to `batch` sequences, the longest first, whose spans add up to `room` at most (or a single one)."""
    piece: list[Ids] = []
    for ids in sorted(spans, key=len, reverse=True):
        if piece and (len(piece) == batch or sum(spans[i] for i in piece) + spans[ids] > room):
            yield piece
            piece = []
        piece.append(ids)
    if piece:
        yield piece


@torch.inference_mode()
def together(model: LM, rows: Sequence[Ids], asked: Sequence[Sequence[Ids]]) -> list[list[tuple[float, bool]]]:
    """Scores of several continuations of each row, in one step; logits only where somebody asks."""
    device = next(model.parameters()).device
    step, begins = packed(rows, device)
    emit: list[int] = []
    at, targets = list[int](), list[int]()
    for ids, begin, continuations in zip(rows, begins, asked, strict=True):
        end = begin + len(ids)
        emit += range(end - max(map(len, continuations)), end)
        for one in continuations:
            at += range(len(emit) - len(one), len(emit))
            targets += one
    logits = model(step.with_(emit=torch.tensor(emit, device=device))).logits
    assert logits is not None
    nats, likeliest = (t.cpu() for t in compared(logits, torch.tensor(at), torch.tensor(targets)))
    sizes = [len(one) for continuations in asked for one in continuations]
    scores = iter(
        (float(a.sum()), bool(b.all())) for a, b in zip(nats.split(sizes), likeliest.split(sizes), strict=True)
    )
    return [[next(scores) for _ in continuations] for continuations in asked]


def compared(logits: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities (float64) of targets by the logits at their places, and whether they are the likeliest."""
    logits = high(logits)
    at, targets = at.to(logits.device), targets.to(logits.device)
    nats = (logits[at, targets] - logits.logsumexp(-1)[at]).double()
    if bool(nats.isnan().any()):
        raise ValueError("the model returned logits that are not numbers (NaN): its weights are damaged or it diverged")
    return nats, logits.argmax(-1)[at] == targets

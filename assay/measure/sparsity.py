"""How much of a trained model's attention a few keys hold, and what the model loses when it sees no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from assay.data.loader import Batch
from assay.measure import passkey
from assay.measure.indexing import Lesson, Taught, teach
from assay.measure.sparsify import Choice, Look, dense_layers, sparsified
from assay.measure.subject import Subject
from assay.ops import attend as ops
from assay.train.evaluate import token_losses

SECONDS = 100.0
NONE = "none"
ENTRIES = 1 << 21
"""Entries of the square (rows x length x length) that one pass may take: each head has logits and a mask of its own."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """keep: how many keys a query may see, or `keep` / `page` whole pages for the rules that see pages."""

    keep: int
    page: int
    taught: Taught | None = None


class Method(Protocol):
    def __call__(self, look: Look, rule: Rule) -> Bool[Tensor, "R G T S"]: ...


def measure(
    subject: Subject,
    *,
    shares: Sequence[float] = (0.0625, 0.125, 0.25),
    methods: Sequence[str] = ("oracle", "shared", "bounds", "mean", "indexer", "random"),
    page: int = 16,
    windows: int = 32,
    steps: int = 300,
    samples: int = 0,
) -> list[Row]:
    """Rows: method, share, keep, mass, loss_nats, loss_delta_nats, accuracy; the first, `none`, is the model as it is.

    keep: `share` of the training length, in keys that each query may see. mass: of the attention of the model as it is,
    the share that these keys hold, the mean over layers and heads. loss_nats: when every layer sees no others, and
    loss_delta_nats: what this adds. All three over the queries in the last eighth of `windows` rows of validation text,
    which could see seven eighths of the length or more. accuracy: of `samples` passkeys (null: none asked) at each of
    two distances in documents of the training length, half of it and the farthest.

    oracle: the keys of the largest logits, for each head. shared: those of the largest attention, the mean of a layer's
    heads, which all look there. bounds and mean: the best pages of `page` tokens for each head, by Quest and by mixture
    of block attention (`ops.attend.Blocks`). indexer: what a lightning indexer chooses for a layer, trained for `steps`
    steps of the recipe's batches to predict the attention of the frozen model. random: keys at random, for each head.

    A model whose layers choose their keys themselves, or that has no softmax attention, has the first row alone.
    """
    check(subject, shares, methods, page, windows)
    batch = subject.joined(subject.length, windows * subject.length)
    dense = float(late(subject, batch).mean())
    first = {"method": NONE, "share": 1.0, "keep": subject.length, "mass": None, "loss_nats": dense}
    rows: list[Row] = [first | {"loss_delta_nats": 0.0, "accuracy": found_keys(subject, samples)}]
    if not dense_layers(subject.model):
        return rows
    rows[0]["mass"] = 1.0
    taught = teach(subject, Lesson(steps)) if "indexer" in methods else None
    keeps = {share: round(share * subject.length) for share in shares}
    rules = {(name, share): Rule(keep, page, taught) for name in methods for share, keep in keeps.items()}
    held = masses(subject, batch, rules)
    for (name, share), rule in rules.items():
        tried = sparsified(subject, choice(name, rule))
        loss = float(late(tried, batch).mean())
        row: Row = {"method": name, "share": share, "keep": rule.keep, "mass": held[name, share], "loss_nats": loss}
        rows.append(row | {"loss_delta_nats": loss - dense, "accuracy": found_keys(tried, samples)})
    return rows


def check(subject: Subject, shares: Sequence[float], methods: Sequence[str], page: int, windows: int) -> None:
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"sparsity: methods: {unknown[0]!r}; accepted: {', '.join(METHODS)}")
    if windows < 1:
        raise ValueError(f"sparsity: windows: {windows}; accepted: 1 or more")
    paged = any(name in ("bounds", "mean") for name in methods)
    for share in shares:
        keep = round(share * subject.length)
        if not 1 <= keep <= subject.length:
            raise ValueError(f"sparsity: shares: {share}; accepted: 1 to {subject.length} keys of {subject.length}")
        if paged and (page < 1 or keep % page):
            raise ValueError(f"sparsity: page: {page}; accepted: a divisor of {keep}, the keys of share {share}")


def pieces(batch: Batch) -> tuple[Batch, ...]:
    return tuple(batch.split(max(1, ENTRIES // batch.grid[1] ** 2)))


def late(subject: Subject, batch: Batch) -> Float[Tensor, "R _"]:
    """Losses in the last eighth of each row."""
    subject.model.eval()
    found = [token_losses(subject.model, piece.to(subject.device)) for piece in pieces(batch)]
    return torch.cat(found).view(batch.grid)[:, -tail(batch) :].double()


def tail(batch: Batch) -> int:
    return max(1, batch.grid[1] // 8)


def found_keys(subject: Subject, samples: int) -> float | None:
    """The share of passkeys that is found, half the length back and as far as there are."""
    if not samples:
        return None
    possible = subject.recipe.mix.passkey.distances(subject.length)
    distances = passkey.spread(possible, 3)[1:]
    return sum(passkey.score(subject, subject.length, d, samples) for d in distances) / len(distances)


def masses(subject: Subject, batch: Batch, rules: Mapping[tuple[str, float], Rule]) -> dict[tuple[str, float], float]:
    """What the keys of each rule hold, in one pass of the model as it is."""
    totals, count = dict.fromkeys(rules, 0.0), 0

    def weigh(look: Look) -> None:
        nonlocal count
        last = slice(-tail(batch), None)
        p = ops.softmax(look.logits, None)[:, :, last]
        count += p.shape[0] * p.shape[1] * p.shape[2]
        for key, rule in rules.items():
            totals[key] += float((p * METHODS[key[0]](look, rule)[:, :, last]).sum())

    watched = sparsified(subject, weigh)
    for piece in pieces(batch):
        token_losses(watched.model, piece.to(subject.device))
    return {key: total / count for key, total in totals.items()}


def choice(name: str, rule: Rule) -> Choice:
    return partial(METHODS[name], rule=rule)


def top(worth: Float[Tensor, "R G T S"], look: Look, keep: int) -> Bool[Tensor, "R G T S"]:
    """The `keep` visible entries of largest worth to each token."""
    seen = look.seen if worth.shape[1] > 1 else look.seen[:, :1]
    best = worth.masked_fill(~seen, float("-inf")).topk(min(keep, worth.shape[-1]), -1).indices
    return torch.zeros_like(seen).scatter_(-1, best, True) & seen


def oracle(look: Look, rule: Rule) -> Bool[Tensor, "R H T S"]:
    return top(look.logits, look, rule.keep)


def shared(look: Look, rule: Rule) -> Bool[Tensor, "R 1 T S"]:
    return top(ops.softmax(look.logits, None).mean(1, keepdim=True), look, rule.keep)


def pages(look: Look, rule: Rule, by: Any) -> Bool[Tensor, "R H T S"]:
    blocks = ops.Blocks(by=by, size=rule.page, keep=rule.keep // rule.page)
    return ops.chosen(blocks, look.q, look.view.dense("k"), look.step, look.view.layout) & look.seen


def indexer(look: Look, rule: Rule) -> Bool[Tensor, "R 1 T S"]:
    assert rule.taught is not None
    return top(rule.taught.worth(look), look, rule.keep)


def random(look: Look, rule: Rule) -> Bool[Tensor, "R H T S"]:
    """The same draw every time, of layer and shape."""
    generator = torch.Generator().manual_seed(look.mixer.site.layer)
    worth = torch.rand(look.logits.shape, generator=generator)
    return top(worth.to(look.logits), look, rule.keep)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "oracle": oracle,
        "shared": shared,
        "bounds": partial(pages, by="bounds"),
        "mean": partial(pages, by="mean"),
        "indexer": indexer,
        "random": random,
    }
)

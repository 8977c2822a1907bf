"""From the logits of a step to a token for each of its sequences, each with a memory of its own.

The order is the sampler's: bias, repetition penalty, presence and frequency penalty, what is forbidden (stop tokens
before `min_new`, what a grammar leaves out), then temperature, top-k, top-p, min-p and typical-p.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.data.tokenizers import Tokenizer
from assay.engine.grammar import Follower, Grammars
from assay.engine.request import GrammarLimits, Request
from assay.engine.sampler import Settings, draw, largest, penalised, probabilities, uniform

DAMAGED = "the model returned logits that are not numbers: its weights are damaged"
Top = tuple[tuple[int, float], ...]  # (token, log-probability), likeliest first


class Unchoosable(ValueError):
    """No token can be chosen for these sequences, and why. Nothing was counted in: others can be asked for again."""

    def __init__(self, why: Mapping[Hashable, str]) -> None:
        super().__init__("; ".join(dict.fromkeys(why.values())))
        self.why = dict(why)


@dataclass(frozen=True)
class Chosen:
    """A token, the natural logarithm of its probability, and the likeliest tokens with theirs, likeliest first.

    The probabilities are the model's own, before bias, penalties, grammar and temperature; None and () where the
    request asks for none. last: the grammar lets nothing follow.
    """

    token: int
    logprob: float | None = None
    top: Top = ()
    last: bool = False


@dataclass
class Row:
    """What is remembered of one sequence. `seen`: how often each token of prompt and reply stands in the reply."""

    request: Request
    seed: int
    choice: int
    said: int = 0
    seen: Counter[int] | None = None
    follower: Follower | None = None

    @classmethod
    def of(cls, request: Request, choice: int, follower: Follower | None) -> Row:
        drawn = request.sampling.seed
        seen = Counter(dict.fromkeys(request.prompt, 0)) if request.sampling.penalises else None
        return cls(request, secrets.randbits(63) if drawn is None else drawn, choice, 0, seen, follower)

    def fork(self, choice: int) -> Row:
        seen = None if self.seen is None else self.seen.copy()
        return replace(self, choice=choice, seen=seen, follower=None if self.follower is None else self.follower.fork())

    def choose(self, token: int, logprob: float | None, top: Top) -> Chosen:
        """Count a token in."""
        self.said += 1
        if self.seen is not None:
            self.seen[token] += 1
        if self.follower is None:
            return Chosen(token, logprob, top)
        self.follower.take(token)
        return Chosen(token, logprob, top, self.follower.done)


@dataclass(frozen=True)
class Batch:
    """Rows that are chosen for together, and what about them stays the same from step to step."""

    keys: tuple[Hashable, ...]
    rows: tuple[Row, ...]
    device: torch.device

    @cached_property
    def drawing(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.request.sampling.temperature > 0]

    @cached_property
    def settings(self) -> Settings:
        """Of the rows in `drawing`."""
        return Settings.of([self.rows[i].request.sampling for i in self.drawing], self.device)

    @cached_property
    def telling(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.request.logprobs is not None]

    @cached_property
    def penalising(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.seen is not None]

    @cached_property
    def penalties(self) -> Settings:
        """Of the rows in `penalising`."""
        return Settings.of([self.rows[i].request.sampling for i in self.penalising], self.device)

    @cached_property
    def constrained(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.follower is not None]

    @cached_property
    def waiting(self) -> list[int]:
        """Rows that must not end at once; a grammar sees to its own."""
        return [i for i, row in enumerate(self.rows) if row.request.min_new and row.follower is None]

    @cached_property
    def edits(self) -> bool:
        biased = any(row.request.sampling.logit_bias for row in self.rows)
        return biased or bool(self.penalising or self.constrained or self.waiting)

    @cached_property
    def bias(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, token and what is added, of every bias."""
        found = [(i, *pair) for i, row in enumerate(self.rows) for pair in row.request.sampling.logit_bias]
        rows, tokens, values = zip(*found) if found else ((), (), ())
        index = torch.tensor([rows, tokens], dtype=torch.long, device=self.device)
        return index[0], index[1], torch.tensor(values, dtype=torch.float32, device=self.device)


class Chooser:
    """The sequences of an engine by key. `vocab`: the width of the model's logits."""

    def __init__(
        self, vocab: int, tokenizer: Tokenizer, device: torch.device | str, limits: GrammarLimits | None = None
    ) -> None:
        self.vocab, self.device = vocab, torch.device(device)
        self.grammars = Grammars(tokenizer, vocab, limits or GrammarLimits())
        self._rows: dict[Hashable, Row] = {}
        self._batch = Batch((), (), self.device)

    def enter(self, key: Hashable, request: Request, choice: int = 0, said: Sequence[int] = ()) -> None:
        """Begin a sequence; `choice` is its number among the replies of its request. said: tokens that it has already.

        ValueError for a token that the model does not have, and for a grammar that cannot be followed.
        """
        assert key not in self._rows, key
        for token, _ in request.sampling.logit_bias:
            if token >= self.vocab:
                raise ValueError(f"logit_bias: token {token}; this model has ids 0 to {self.vocab - 1}")
        follower = None if request.grammar is None else self.grammars.start(request.grammar, request.stop_tokens)
        row = Row.of(request, choice, follower)
        for token in said:
            row.choose(token, None, ())
        self._rows[key] = row

    def fork(self, key: Hashable, new: Hashable, choice: int) -> None:
        """A sequence that has said what `key` has, and draws what follows by itself."""
        assert new not in self._rows, new
        self._rows[new] = self._rows[key].fork(choice)

    def leave(self, key: Hashable) -> None:
        del self._rows[key]
        self._batch = Batch((), (), self.device)

    @torch.inference_mode()
    def choose(self, keys: Sequence[Hashable], logits: Float[Tensor, "E V"]) -> list[Chosen]:
        """A token for each sequence, counted in. Rows do not see each other.

        Unchoosable (a ValueError) names the sequences whose logits are not numbers or whose grammar cannot go on.
        """
        if tuple(keys) != self._batch.keys:
            self._batch = Batch(tuple(keys), tuple(self._rows[key] for key in keys), self.device)
        batch = self._batch
        values, indices = largest(logits)
        wrong = [key for key, value in zip(batch.keys, values.tolist(), strict=True) if not math.isfinite(value)]
        if wrong:
            raise Unchoosable(dict.fromkeys(wrong, DAMAGED))
        if logits.dtype != torch.float64 and (batch.edits or batch.drawing or batch.telling):
            logits = logits.float()
        changed = edited(logits, batch) if batch.edits else logits
        if batch.edits:
            indices = largest(changed)[1]
        if batch.drawing:
            indices = drawn(changed, indices, batch)
        tokens: list[int] = indices.tolist()
        told = tell(logits, tokens, batch)
        return [row.choose(token, *told.get(i, (None, ()))) for i, (row, token) in enumerate(zip(batch.rows, tokens))]


def edited(logits: Float[Tensor, "E V"], batch: Batch) -> Float[Tensor, "E V"]:
    """The logits with bias and penalties, and -inf for what is forbidden; a copy."""
    logits = logits.clone()
    rows, tokens, values = batch.bias
    logits[rows, tokens] += values.to(logits.dtype)
    if batch.penalising:
        _penalise(logits, batch)
    for i in batch.waiting:
        row = batch.rows[i]
        ends = [token for token in row.request.stop_tokens if token < logits.shape[1]]
        if row.said < row.request.min_new and len(ends) < logits.shape[1]:
            logits[i, torch.tensor(ends, dtype=torch.long, device=logits.device)] = float("-inf")
    if batch.constrained:
        _constrain(logits, batch)
    return logits


def _penalise(logits: Tensor, batch: Batch) -> None:
    """Only the entries of tokens that a row has seen are touched."""
    seen = [batch.rows[i].seen or Counter[int]() for i in batch.penalising]
    device = logits.device
    number = torch.arange(len(seen)).repeat_interleave(torch.tensor([len(counts) for counts in seen])).to(device)
    rows = torch.tensor(batch.penalising, device=device)[number]
    tokens = torch.from_numpy(np.fromiter(chain.from_iterable(seen), np.int64)).to(device)
    counted = np.fromiter(chain.from_iterable(counts.values() for counts in seen), np.int64)
    said = torch.from_numpy(counted).to(device)[:, None]
    settings = batch.penalties.of_rows(number)
    found = penalised(logits[rows, tokens][:, None], settings, torch.ones_like(said, dtype=torch.bool), said)
    logits[rows, tokens] = found[:, 0].to(logits.dtype)


def _constrain(logits: Tensor, batch: Batch) -> None:
    """-inf for what the grammars of some rows leave out. Unchoosable names all rows whose grammar cannot go on."""
    masks, wrong = [], dict[Hashable, str]()
    for i in batch.constrained:
        row = batch.rows[i]
        assert row.follower is not None
        try:
            masks.append(row.follower.allowed(row.said >= row.request.min_new))
        except ValueError as error:
            wrong[batch.keys[i]] = str(error)
    if wrong:
        raise Unchoosable(wrong)
    bits = torch.from_numpy(np.stack(masks)).to(logits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (bits[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[1]].bool()
    rows = torch.tensor(batch.constrained, device=logits.device)
    logits[rows] = torch.where(allowed, logits[rows], float("-inf"))


def drawn(logits: Float[Tensor, "E V"], greedy: Int[Tensor, "E"], batch: Batch) -> Int[Tensor, "E"]:
    """The greedy tokens, replaced where a row draws."""
    rows = batch.drawing
    mine = logits if len(rows) == len(batch.rows) else logits[rows]
    values = [uniform(row.seed, row.said, row.choice) for row in (batch.rows[i] for i in rows)]
    uniforms = torch.tensor(values, dtype=torch.float64).to(logits.device)
    tokens = draw(probabilities(mine, batch.settings), uniforms)
    return tokens if mine is logits else greedy.index_put((torch.tensor(rows, device=logits.device),), tokens)


def tell(logits: Float[Tensor, "E V"], tokens: Sequence[int], batch: Batch) -> dict[int, tuple[float, Top]]:
    """By row that asks: the log-probability of its token, and the likeliest tokens with theirs."""
    rows = batch.telling
    if not rows:
        return {}
    wanted = [batch.rows[i].request.logprobs or 0 for i in rows]
    log = logits[rows].log_softmax(-1)
    own = log.gather(-1, torch.tensor([[tokens[i]] for i in rows], device=log.device))[:, 0].tolist()
    best = log.topk(min(max(wanted), log.shape[1]), -1)
    pairs = [tuple(zip(ids, values)) for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return {i: (mine, top[:k]) for i, mine, top, k in zip(rows, own, pairs, wanted, strict=True)}

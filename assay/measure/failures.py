"""A gallery of failing generations, each with the metric that found it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.engine.engine import generate
from assay.engine.request import Request, SamplingParams
from assay.measure.subject import Subject
from assay.ops.step import rows_step

SECONDS = 4.0
KIND = "failure"


@dataclass(frozen=True)
class Continuation:
    """A prompt and what a model made of it. entropy: of the distribution that each new token was drawn from, in nats;
    within: how many of the new tokens stand within the training length."""

    prompt: str
    text: str
    raw: bytes
    ids: tuple[int, ...]
    entropy: tuple[float, ...]
    within: int


@dataclass(frozen=True)
class Test:
    """A metric of a continuation (None: it says nothing here), from which score on it is a failure, and why."""

    metric: str
    score: Callable[[Continuation], float | None]
    bad: Callable[[float], bool]
    why: str


def measure(
    subject: Subject,
    *,
    prompts: int | Sequence[str] = 4,
    new_tokens: int | None = None,
    temperatures: Sequence[float] = (0.0, 1.0),
    keep: int = 2,
) -> list[dict[str, Any]]:
    """Failures: metric, score, prompt, text, why: the `keep` worst of each metric, worst first; none is a good sign.

    prompts: texts, or how many beginnings (half the training length) of validation windows. new_tokens: null goes on
    to twice the training length; fewer where the model's positions end. Greedy decoding shows loops, sampling at
    temperature 1 shows what the model's own distribution has become.
    """
    found = [c for t in temperatures for c in continuations(subject, texts(subject, prompts), new_tokens, t)]
    rows = []
    for test in TESTS:
        scored = [(s, c) for c in found if (s := test.score(c)) is not None and test.bad(s)]
        scored.sort(key=lambda pair: pair[0], reverse=test.bad(float("inf")))
        for score, c in scored[:keep]:
            row = {"metric": test.metric, "score": float(score), "prompt": c.prompt, "text": c.text, "why": test.why}
            rows.append(row)
    return rows


def texts(subject: Subject, prompts: int | Sequence[str]) -> list[tuple[int, ...]]:
    """Prompts as ids."""
    if not isinstance(prompts, int):
        return [tuple(subject.tokenizer.encode(text).tolist()) for text in prompts]
    half = max(1, subject.length // 2)
    batch = subject.joined(half, prompts * half, prompts)
    return [tuple(row) for row in batch.inputs.view(batch.grid).tolist()]


def continuations(
    subject: Subject, prompts: Sequence[tuple[int, ...]], new_tokens: int | None, temperature: float
) -> list[Continuation]:
    """Every prompt continued, all at once. A model whose positions leave no room for any gives none."""
    longest = max(len(ids) for ids in prompts)
    new = new_tokens if new_tokens is not None else max(1, 2 * subject.length - longest)
    new = new if subject.limit is None else min(new, subject.limit - longest)
    if new < 1:
        return []
    how = SamplingParams(temperature=temperature, seed=0)
    asked = [
        Request(prompt=ids, max_new=new, sampling=how.model_copy(update={"seed": i})) for i, ids in enumerate(prompts)
    ]
    said: list[list[int]] = [[] for _ in prompts]
    for token in generate(subject.model, subject.tokenizer, asked):
        said[token.request] += [token.id] if token.id is not None else []
    return [continuation(subject, ids, reply) for ids, reply in zip(prompts, said, strict=True)]


def continuation(subject: Subject, prompt: tuple[int, ...], reply: Sequence[int]) -> Continuation:
    show = subject.tokenizer.decode
    entropy = entropies(subject, [*prompt, *reply])[len(prompt) - 1 : -1]
    within = max(0, min(len(reply), subject.length - len(prompt)))
    raw = subject.tokenizer.decode_bytes(reply)
    return Continuation(show(prompt), show(list(reply)), raw, tuple(reply), tuple(entropy.tolist()), within)


@torch.no_grad()
def entropies(subject: Subject, ids: Sequence[int]) -> Tensor:
    """[T] nats: of the next-token distribution after each token of one sequence."""
    logits = subject.model.eval()(rows_step(torch.tensor([ids], device=subject.device))).logits
    assert logits is not None
    return torch.distributions.Categorical(logits=logits.float()).entropy().cpu()


def longest_repeat(ids: Sequence[int]) -> int:
    """Length of the longest n-gram that stands twice; the two may overlap, so that a loop counts in full."""
    values, best = np.asarray(ids), 0
    for lag in range(1, len(values)):
        if len(values) - lag <= best:
            break
        same = np.concatenate([[False], values[lag:] == values[:-lag], [False]])
        ends = np.flatnonzero(np.diff(same.astype(np.int8)))
        best = max(best, int((ends[1::2] - ends[::2]).max(initial=0)))
    return best


def repeated_share(c: Continuation) -> float | None:
    """The longest n-gram that stands twice, as a share of the longest there can be."""
    return longest_repeat(c.ids) / (len(c.ids) - 1) if len(c.ids) >= 16 else None


def compressed_share(c: Continuation) -> float | None:
    """Bytes after DEFLATE over bytes before; running text of a few hundred bytes keeps about half."""
    return len(zlib.compress(c.raw, 9)) / len(c.raw) if len(c.raw) >= 64 else None


def invalid_share(c: Continuation) -> float | None:
    """The share of bytes that belong to no UTF-8 character. A last one that was cut off does not count."""
    if not c.raw:
        return None
    valid = len(c.raw.decode("utf-8", "ignore").encode())
    cut = next((n for n in range(1, 4) if _begins(c.raw[-n:])), 0)
    return max(0, len(c.raw) - valid - cut) / len(c.raw)


def _begins(tail: bytes) -> bool:
    """Whether these bytes begin a character that needs more of them."""
    need = 2 if 0xC2 <= tail[0] < 0xE0 else 3 if 0xE0 <= tail[0] < 0xF0 else 4 if 0xF0 <= tail[0] < 0xF5 else 0
    return len(tail) < need and all(0x80 <= b < 0xC0 for b in tail[1:])


def entropy_rise(c: Continuation) -> float | None:
    """Nats that the model's uncertainty rises, in the mean, past the training length."""
    inside, outside = c.entropy[: c.within], c.entropy[c.within :]
    if len(inside) < 8 or len(outside) < 8:
        return None
    return sum(outside) / len(outside) - sum(inside) / len(inside)


TESTS = (
    Test("repeated_share", repeated_share, lambda s: s >= 0.5, "a loop: one n-gram, repeated, is half of it or more"),
    Test("compressed_share", compressed_share, lambda s: s <= 0.2, "says little: it compresses to a fifth or less"),
    Test("invalid_utf8_share", invalid_share, lambda s: s >= 0.02, "not text: bytes that make no UTF-8 character"),
    Test("entropy_rise_nats", entropy_rise, lambda s: s >= 0.5, "less certain past the training length, by half a nat"),
)

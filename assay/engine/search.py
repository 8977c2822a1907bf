"""Replies that are searched for, not drawn: beam search and contrastive search, on the engine's runner and its pages.

Bias, penalties, `min_new` and grammars act as in the chooser; for beams on log-probabilities, as in transformers.
Beginnings share the pages of what they have in common, the prompt above all: a fork copies none of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from assay.cache import PageSize, Slot
from assay.data.tokenizers import Tokenizer
from assay.engine.chooser import Batch, Row, edited
from assay.engine.engine import check_request
from assay.engine.grammar import Grammars
from assay.engine.request import Beams, Contrastive, GrammarLimits, Request, SamplingParams
from assay.engine.runner import CHUNK, Finish, Runner, Work
from assay.engine.text import Reply
from assay.model.lm import LM

PAGE = 16
DRAWS = ("top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class Found:
    """A reply. score: of beams, what they are ranked by; of contrastive search, the sum of its tokens' scores."""

    ids: tuple[int, ...]
    text: str
    finish: Finish
    score: float


@dataclass(frozen=True)
class Beam:
    """A beginning. total: the sum of its log-probabilities; ended: nothing follows."""

    slot: Slot
    row: Row
    said: tuple[int, ...]
    total: float
    ended: bool = False

    def score(self, length_penalty: float) -> float:
        return self.total / float(len(self.said)) ** length_penalty


def search(model: LM, tokenizer: Tokenizer, request: Request, how: Beams | Contrastive) -> list[Found]:
    """The best replies, best first: `request.n` of beam search, one of contrastive search.

    ValueError names what of the request a search does not honour, and as the engine's `submit` does.
    """
    check_search(request, how)
    check_request(model.spec, request, request.horizon)
    return _beams(model, tokenizer, request, how) if isinstance(how, Beams) else _best(model, tokenizer, request, how)


def check_search(request: Request, how: Beams | Contrastive) -> None:
    """ValueError for what a search does not do."""
    name = "beam search" if isinstance(how, Beams) else "contrastive search"
    most = how.width if isinstance(how, Beams) else 1
    sampling, plain = request.sampling, SamplingParams()
    for field in DRAWS:
        if getattr(sampling, field) != getattr(plain, field):
            raise ValueError(f"{field}: {getattr(sampling, field)}; {name} does not draw: leave it out")
    if sampling.temperature not in (0.0, 1.0):
        raise ValueError(f"temperature: {sampling.temperature}; {name} does not draw: accepted: 0 and 1")
    if request.n > most:
        raise ValueError(f"n: {request.n}; {name} finds {most}: accepted: 1 to {most}")
    if request.logprobs is not None:
        raise ValueError(f"logprobs: {request.logprobs}; {name} tells scores of whole replies: leave it out")
    if request.stop and isinstance(how, Beams):
        raise ValueError(f"stop: {request.stop[0]!r}; beams end at tokens: accepted: stop tokens")


def _runner(model: LM, request: Request, rows: int) -> Runner:
    """Pages for the prompt once, and for each of `rows` sequences what it says itself."""
    prompt, new = len(request.prompt), request.max_new
    pages = -(-prompt // PAGE) + rows * (-(-new // PAGE) + 2)
    return Runner(model, PageSize(rows, PAGE, pages, min(CHUNK, request.horizon), len(request.source)))


def _row(model: LM, tokenizer: Tokenizer, request: Request) -> Row:
    if request.grammar is None:
        return Row.of(request, 0, None)
    grammars = Grammars(tokenizer, model.spec.vocab, GrammarLimits())
    return Row.of(request, 0, grammars.start(request.grammar, request.stop_tokens))


def _edited(logits: Float[Tensor, "B V"], rows: Sequence[Row]) -> Float[Tensor, "B V"]:
    batch = Batch(tuple(range(len(rows))), tuple(rows), logits.device)
    return edited(logits, batch) if batch.edits else logits


def _told(tokenizer: Tokenizer, beam: Beam, request: Request, score: float) -> Found:
    reply, stopped = Reply(tokenizer), beam.said[-1] in request.stop_tokens
    text = "".join(map(reply.push, beam.said[:-1] if stopped else beam.said)) + reply.finish()
    return Found(beam.said, text, "stop" if stopped or beam.ended else "length", score)


@torch.inference_mode()
def _beams(model: LM, tokenizer: Tokenizer, request: Request, how: Beams) -> list[Found]:
    runner = _runner(model, request, how.width)
    slot = runner.open(request.horizon, request.source)
    live, done = [Beam(slot, _row(model, tokenizer, request), (), 0.0)], list[Beam]()
    logits = runner.feed([slot], [request.prompt])
    while live:
        live, ended = grown(live, logits, request, how.width)
        done = sorted([*done, *ended], key=lambda beam: -beam.score(how.length_penalty))[: how.width]
        if not live or (len(done) == how.width and _reach(live[0], request, how) <= done[-1].score(how.length_penalty)):
            break
        live = list(_placed(runner, live))
        logits = runner.step([Work(beam.slot, beam.said[-1:]) for beam in live])
    if not done:
        raise ValueError("beam search: no reply ended with a probability above 0")
    return [_told(tokenizer, beam, request, beam.score(how.length_penalty)) for beam in done[: request.n]]


def _reach(beam: Beam, request: Request, how: Beams) -> float:
    """No reply that begins so can score more: its sum only falls, and no length divides it by more."""
    length = request.max_new if how.length_penalty > 0 else len(beam.said)
    return beam.total / float(length) ** how.length_penalty


def grown(
    live: Sequence[Beam], logits: Float[Tensor, "B V"], request: Request, width: int
) -> tuple[list[Beam], list[Beam]]:
    """The `width` likeliest beginnings that go on, likeliest first, and what ends among the `width` likeliest of all.

    Enough candidates are looked at that `width` go on, however many end. The beams that go on keep the slots of those
    that they came from.
    """
    log = _edited(logits.double().log_softmax(-1), [beam.row for beam in live])
    totals = log + torch.tensor([beam.total for beam in live], dtype=log.dtype, device=log.device)[:, None]
    count = width * (1 + max(1, len(request.stop_tokens)))
    best = totals.flatten().topk(min(count, totals.numel()))
    going, ended = list[Beam](), list[Beam]()
    for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        if total == float("-inf") or len(going) == width <= rank:
            break
        parent, token = live[place // totals.shape[1]], place % totals.shape[1]
        row = parent.row.fork(0)
        last = row.choose(token, None, ()).last or token in request.stop_tokens
        beam = Beam(parent.slot, row, (*parent.said, token), total, last)
        if last or len(beam.said) == request.max_new:
            ended += [beam] if rank < width else []
        elif len(going) < width:
            going.append(beam)
    return going, ended


def _placed(runner: Runner, beams: Sequence[Beam]) -> Iterator[Beam]:
    """The beams, each in a slot of its own: the first child of a beginning keeps its slot, others are forks."""
    kept = {beam.slot for beam in beams}
    for slot in [slot for slot in runner.horizons if slot not in kept]:
        runner.close(slot)
    for beam in beams:
        if beam.slot in kept:
            kept.remove(beam.slot)
            yield beam
        else:
            yield replace(beam, slot=runner.fork(beam.slot))


@torch.inference_mode()
def _best(model: LM, tokenizer: Tokenizer, request: Request, how: Contrastive) -> list[Found]:
    runner = _runner(model, request, how.candidates)
    if runner.width is not None:
        raise ValueError(
            "contrastive search reads the hidden states of whole steps, and deterministic steps in half precision are "
            "cut into pieces; accepted: --dtype f32"
        )
    slot = runner.open(request.horizon, request.source)
    row, reply, text, score, said = (
        _row(model, tokenizer, request),
        Reply(tokenizer, request.stop, request.min_new),
        "",
        0.0,
        list[int](),
    )
    logits, context = _read(runner, slot, request.prompt)
    while True:
        likely = _edited(logits[None], [row]).softmax(-1)[0].topk(min(how.candidates, logits.shape[0]))
        tokens = [token for token, p in zip(likely.indices.tolist(), likely.values.tolist(), strict=True) if p > 0]
        slots = [slot, *(runner.fork(slot) for _ in tokens[1:])]
        every, hidden = _hidden(runner, [Work(one, (token,)) for one, token in zip(slots, tokens, strict=True)])
        scores = _contrasted(likely.values[: len(tokens)], hidden, context, how.penalty)
        best = int(scores.argmax())
        for one in slots[:best] + slots[best + 1 :]:
            runner.close(one)
        slot, logits, context = slots[best], every[best], torch.cat([context, hidden[best : best + 1]])
        said, score = [*said, tokens[best]], score + float(scores[best])
        last = row.choose(tokens[best], None, ()).last
        stop = tokens[best] in request.stop_tokens
        text += "" if stop else reply.push(tokens[best])
        if last or stop or reply.stopped or len(said) == request.max_new:
            finish: Finish = "stop" if last or stop or reply.stopped else "length"
            return [Found(tuple(said), text + reply.finish(), finish, score)]


def _read(runner: Runner, slot: Slot, prompt: Sequence[int]) -> tuple[Float[Tensor, "V"], Float[Tensor, "T D"]]:
    """Feed a prompt: the logits after it, and the hidden states of all its tokens."""
    chunk = runner.cache.size.chunk
    read = [_hidden(runner, [Work(slot, prompt[at : at + chunk])]) for at in range(0, len(prompt), chunk)]
    return read[-1][0][0], torch.cat([hidden for _, hidden in read])


def _hidden(runner: Runner, work: Sequence[Work]) -> tuple[Float[Tensor, "E V"], Float[Tensor, "N D"]]:
    """Logits and hidden states (after the last norm, as the head reads them) of one step, in float32 or more."""
    name = f"{runner.model.prefix}final"
    out = runner.output(work, frozenset({name}))
    assert out.logits is not None
    logits, hidden = (t if t.dtype == torch.float64 else t.float() for t in (out.logits, out.taps[name]))
    return logits, hidden


def _contrasted(
    p: Float[Tensor, "k"], hidden: Float[Tensor, "k D"], context: Float[Tensor, "T D"], penalty: float
) -> Float[Tensor, "k"]:
    """Equation 5 of Su et al. 2022."""
    similar = torch.nn.functional.normalize(hidden, dim=-1) @ torch.nn.functional.normalize(context, dim=-1).T
    return (1 - penalty) * p - penalty * similar.amax(-1)

"""The engine: requests come and go at any time, and every step serves all that run.

`submit` and `cancel` between steps; `step` plans, runs the model once, chooses a token for each sequence that has read
all of its own, and says what came of it. One thread calls it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from assay.cache import Slot, Swapped
from assay.data.tokenizers import Tokenizer
from assay.engine.attention import check as check_attention
from assay.engine.chooser import Chooser, Chosen, Unchoosable
from assay.engine.config import EngineConfig, cache_size, scheduling, sequence_limit
from assay.engine.handoff import Handed, layout
from assay.engine.request import Request
from assay.engine.runner import CHUNK, Finish, Runner, Token, Work, check_context, check_continues, check_source
from assay.engine.scheduler import Job, Plan, Scheduler
from assay.engine.storage import Storage
from assay.engine.text import Reply
from assay.model.lm import LM, state_table
from assay.spec.load import digest
from assay.spec.model import ModelSpec


@dataclass(eq=False)
class Running:
    """One reply on its way. known: the prompt and what was said. reused: tokens of the prompt that were stored. given:
    what another engine stored of it, kept until it goes on here."""

    number: int
    choice: int
    request: Request
    known: list[int]
    reply: Reply
    arrival: float
    slot: Slot | None = None
    swapped: Swapped | None = None
    reused: int = 0
    given: Swapped | None = None

    @property
    def said(self) -> int:
        return len(self.known) - len(self.request.prompt)

    def take(self, chosen: Chosen) -> Token:
        """Count the token in, and say what it adds to the text."""
        token = chosen.token
        self.known.append(token)
        self.given = None
        stop = token in self.request.stop_tokens
        text = "" if stop else self.reply.push(token)
        finish: Finish | None = "stop" if stop or chosen.last or self.reply.stopped else None
        if finish is None and self.said == self.request.max_new:
            finish = "length"
        text += self.reply.finish() if finish else ""
        return Token(self.number, token, text, finish, self.choice, chosen.logprob, chosen.top, self.reused)


@dataclass(frozen=True)
class Iteration:
    """What the last step did: tokens of prompts, sequences that got one token, tokens they all read, seconds."""

    prompt: int
    decodes: int
    context: int
    seconds: float


@dataclass(frozen=True)
class _Room:
    """The cache as the scheduler sees it, by the ids of jobs. As many rows as jobs may run, so one is always free."""

    runner: Runner
    salt: Callable[[Request], bytes] | None
    jobs: Mapping[int, Running]

    def open(self, job: int) -> int | None:
        live = self.jobs[job]
        if live.given is not None:
            live.slot = self.runner.swap_in(live.given, live.request.horizon)
            return None if live.slot is None else self.runner.cache.length(live.slot)
        request, known = live.request, live.known if self.salt is not None else ()
        key = self.salt(request) if self.salt is not None else b""
        live.slot = self.runner.open(request.horizon, request.source, known, key)
        stored = self.runner.cache.length(live.slot)
        live.reused = live.reused if live.said else stored
        return stored

    def fits(self, grow: Mapping[int, int]) -> bool:
        return self.runner.cache.fits([(self._slot(job), count) for job, count in grow.items()])

    def close(self, job: int) -> None:
        live = self.jobs[job]
        if live.slot is not None:
            self.runner.close(live.slot)
        live.slot = live.swapped = None

    def swap_out(self, job: int) -> bool:
        live = self.jobs[job]
        live.swapped, live.slot = self.runner.swap_out(self._slot(job)), None
        return True

    def swap_in(self, job: int) -> bool:
        live = self.jobs[job]
        assert live.swapped is not None
        slot = self.runner.swap_in(live.swapped, live.request.horizon)
        if slot is not None:
            live.slot, live.swapped = slot, None
        return slot is not None

    def _slot(self, job: int) -> Slot:
        slot = self.jobs[job].slot
        assert slot is not None
        return slot


class Engine:
    """A model that serves requests. `tokenizer` turns tokens into text, and grammars into what they allow."""

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        storage: Storage | None = None,
    ) -> None:
        config = config if config is not None else EngineConfig()
        check_continues(model.spec)
        self.spec, self.tokenizer, self.config, self.clock = model.spec, tokenizer, config, clock
        fields, dtype = state_table(model.spec, model.prefix), next(model.parameters()).dtype
        self.tokens = sequence_limit(model.spec, config.tokens)
        formats = storage.formats if storage is not None else None
        check_attention(config.attention, model)
        size = cache_size(config, model.spec, fields, dtype, formats)
        self.runner = Runner(model, size, storage, config.attention)
        self.chooser = Chooser(model.spec.vocab, tokenizer, self.runner.device)
        self.jobs: dict[int, Running] = {}
        self.waiting: dict[int, list[int]] = {}  # further choices of a request, until its first has read the prompt
        shares = config.prefix and config.page is not None
        room = _Room(self.runner, self._salt if shares else None, self.jobs)
        self.scheduler = Scheduler(room, scheduling(config, self.tokens, self.runner.cache.border))
        self.last: Iteration | None = None
        self._model = digest(model.spec)
        self._lengths = any(scheme.by_length for scheme in model.spec.positions.values())
        self._requests = self._ids = 0

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def submit(self, request: Request) -> int:
        """Take a request in; its number. ValueError names what cannot be served, and nothing has changed."""
        check_request(self.spec, request, self.tokens)
        now, number, jobs = self.clock(), self._requests, range(self._ids, self._ids + request.n)
        entered: list[int] = []
        try:
            for choice, job in enumerate(jobs):
                self.chooser.enter(job, request, choice)
                entered.append(job)
        except ValueError:
            for job in entered:
                self.chooser.leave(job)
            raise
        for choice, job in enumerate(jobs):
            reply = Reply(self.tokenizer, request.stop, request.min_new)
            self.jobs[job] = Running(number, choice, request, list(request.prompt), reply, now)
        self._requests, self._ids = number + 1, jobs.stop
        self._add(jobs[0])
        self.waiting[jobs[0]] = list(jobs[1:])
        return number

    def cancel(self, number: int) -> None:
        """End a request wherever it stands; what it holds is free before the next step. One that has ended stays so."""
        for job in [job for job, live in self.jobs.items() if live.number == number]:
            self.waiting.pop(job, None)
            self.scheduler.cancel(job)
            self._forget(job)

    def hand_over(self, number: int, choice: int = 0) -> Handed:
        """Take a running reply out, with all that is stored of it, for another engine's `adopt`. ValueError where it
        has said nothing yet, or does not run."""
        found = (job for job, live in self.jobs.items() if (live.number, live.choice) == (number, choice))
        job = next(found, None)
        live = None if job is None else self.jobs[job]
        if job is None or live is None or live.slot is None or not live.said:
            raise ValueError(f"hand_over: reply {choice} of request {number} does not run, or has said nothing yet")
        said = tuple(live.known[len(live.request.prompt) :])
        moved, live.slot = self.runner.swap_out(live.slot), None
        self.scheduler.cancel(job)
        self._forget(job)
        return Handed(live.request, choice, said, live.arrival, live.reused, layout(self.runner.cache), moved)

    def adopt(self, handed: Handed) -> int:
        """Go on with a reply that another engine has begun; its number here. ValueError where that cannot be."""
        request, said, job = handed.request, handed.said, self._ids
        check_request(self.spec, request, self.tokens)
        given = handed.fitted(self.runner.cache)
        self.chooser.enter(job, request, handed.choice, said)
        reply, known = Reply(self.tokenizer, request.stop, request.min_new), [*request.prompt, *said]
        for token in said:
            reply.push(token)
        number, self._requests, self._ids = self._requests, self._requests + 1, job + 1
        live = Running(number, handed.choice, request, known, reply, handed.arrival)
        live.reused, live.given = handed.reused, given
        self.jobs[job] = live
        self._add(job)
        return number

    def step(self) -> list[Token]:
        """One step of everything that can run; what was said, and what ended without saying more."""
        began = self.clock()
        plan = self.scheduler.plan(began)
        said = [self._end(job, "deadline") for job in plan.expired]
        if plan.tokens:
            told = sum(n for _, n in plan.chunks)
            stored = sum(map(self._stored, (*plan.decodes, *(job for job, _ in plan.chunks))))
            said += self._run(plan)
            self.last = Iteration(told, len(plan.decodes), stored + plan.tokens, self.clock() - began)
        return said

    def stats(self) -> dict[str, Any]:
        """What runs and waits, pages of all kinds together, and the cache's own report."""
        running, found = len(self.scheduler.running), self.runner.cache.report()
        groups = found.get("groups", ())
        names = {"pages_total": "pages", "pages_used": "used", "pages_cached": "cached", "pages_free": "free"}
        pages = {name: sum(group[key] or 0 for group in groups) for name, key in names.items()}
        return {"running": running, "waiting": len(self.jobs) - running, **pages, **found}

    def _salt(self, request: Request) -> bytes:
        """What prompts must have in common, beside their tokens, for one to use what the other stored."""
        horizon = request.horizon if self._lengths else None
        return repr((self._model, request.serving.tenant, horizon, request.source)).encode()

    def _add(self, job: int) -> None:
        live = self.jobs[job]
        asked, arrival = live.request.serving, live.arrival
        deadline = None if asked.deadline_s is None else arrival + asked.deadline_s
        known, new = len(live.known), live.request.max_new - live.said
        self.scheduler.add(Job(job, known, new, arrival, asked.priority, asked.tenant, deadline))

    def _release(self, job: int) -> None:
        """The other choices of a request may run: what they read is stored now, or never will be."""
        for other in self.waiting.pop(job, ()):
            self._add(other)

    def _run(self, plan: Plan) -> list[Token]:
        work = {job: self._work(job, 1) for job in plan.decodes} | {job: self._work(job, n) for job, n in plan.chunks}
        logits = self.runner.step(list(work.values()), kept=False)
        self.runner.cache.settle([one.slot for one in work.values()])
        chosen = self._choose([job for job, one in work.items() if one.emit], logits)
        said = {job: self._say(job, told) for job, told in chosen.items()}
        self.scheduler.ran(plan, {job: token.finish is not None for job, token in said.items()})
        for job, token in said.items():
            self._release(job)
            if token.finish is not None:
                self._forget(job)
        return list(said.values())

    def _work(self, job: int, count: int) -> Work:
        live, stored = self.jobs[job], self._stored(job)
        assert live.slot is not None
        return Work(live.slot, live.known[stored : stored + count], stored + count == len(live.known))

    def _stored(self, job: int) -> int:
        slot = self.jobs[job].slot
        assert slot is not None
        return self.runner.cache.length(slot)

    def _choose(self, jobs: Sequence[int], logits: Tensor) -> dict[int, Chosen | str]:
        """A token for each, or why none can be chosen for it."""
        try:
            return dict(zip(jobs, self.chooser.choose(jobs, logits), strict=True))
        except Unchoosable as error:
            good = [i for i, job in enumerate(jobs) if job not in error.why]
            found = self._choose([jobs[i] for i in good], logits[good]) if good else {}
            return {job: found.get(job) or error.why[job] for job in jobs}

    def _say(self, job: int, chosen: Chosen | str) -> Token:
        live = self.jobs[job]
        return self._ended(live, "error", chosen) if isinstance(chosen, str) else live.take(chosen)

    def _ended(self, live: Running, finish: Finish, why: str = "") -> Token:
        return Token(live.number, None, live.reply.finish(), finish, live.choice, reused=live.reused, why=why)

    def _end(self, job: int, finish: Finish) -> Token:
        token = self._ended(self.jobs[job], finish)
        self._release(job)
        self._forget(job)
        return token

    def _forget(self, job: int) -> None:
        self.chooser.leave(job)
        del self.jobs[job]


def check_request(spec: ModelSpec, request: Request, tokens: int) -> None:
    """ValueError for ids that the model does not have and for what is longer than it, or this engine, reads."""
    if max(request.prompt) >= spec.vocab or min(request.prompt) < 0:
        raise ValueError(f"prompt token {max(request.prompt)}; this model has ids 0 to {spec.vocab - 1}")
    check_context(spec, len(request.prompt), request.max_new)
    check_source(spec, request.source)
    if request.horizon > tokens:
        raise ValueError(
            f"a prompt of {len(request.prompt)} tokens and {request.max_new} new ones are {request.horizon}; "
            f"this engine serves sequences of up to {tokens} tokens"
        )


def generate(model: LM, tokenizer: Tokenizer, requests: Sequence[Request], chunk: int = CHUNK) -> Iterator[Token]:
    """Continue every prompt, all at once. Tokens come as they are made, a round for all that still speak.

    ValueError where the model's logits are not numbers, or a grammar cannot go on.
    """
    if not requests:
        return
    check_continues(model.spec)
    replies = sum(request.n for request in requests)
    longest = max(request.horizon for request in requests)
    for request in requests:
        check_request(model.spec, request, longest)
    chunk = min(chunk, max(len(request.prompt) for request in requests))
    config = EngineConfig(
        max_running=replies,
        tokens=max(longest, 2),
        page=None,
        chunk=chunk,
        budget=chunk * replies,
        policy="prefill_first",
    )
    engine = Engine(model, tokenizer, config)
    for request in requests:
        engine.submit(request)
    while engine.busy:
        for token in engine.step():
            if token.finish == "error":
                raise ValueError(token.why)
            yield token

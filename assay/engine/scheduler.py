"""Which requests run in the next step, and how many tokens of each. No torch: the engine and the simulator share it.

Batches are formed anew for every step: Yu et al. 2022 (Orca, OSDI). Prompts in chunks beside decodes, under a budget of
tokens: Agrawal et al. 2024 (Sarathi-Serve, arXiv 2403.02310). Preemption by recomputing or swapping: Kwon et al. 2023
(vLLM, arXiv 2309.06180).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from assay.engine.policy import EAGER
from assay.engine.policy import Job as Job
from assay.engine.policy import Plan as Plan
from assay.engine.policy import Room as Room
from assay.engine.policy import SchedulerConfig as SchedulerConfig
from assay.engine.queues import Queue, Rank


@dataclass(slots=True)
class _Live:
    """A job that has not ended. `stored` of its prompt and what it has `said` are in memory."""

    job: Job
    rank: Rank
    said: int = 0
    stored: int = 0
    swapped: bool = False
    charged: bool = False

    @property
    def missing(self) -> int:
        return self.job.prompt + self.said - self.stored

    @property
    def decodes(self) -> bool:
        return self.said > 0 and self.missing == 1

    def ahead(self, watermark: int) -> int:
        return min(self.missing + watermark, self.job.horizon - self.stored)


class Scheduler:
    """Call `plan`, run the step, call `ran`. In between jobs may be added and cancelled.

    A preempted job returns to its place in the queue. Whoever ranks worst is preempted first, so that the best one
    that runs always goes on, and everybody's turn comes. A job that does not fit holds up those behind it.
    """

    def __init__(self, room: Room, config: SchedulerConfig) -> None:
        self.room, self.config = room, config
        self._watermark = config.capacity if config.reserve == "full" else config.watermark
        self._live: dict[int, _Live] = {}
        self._running: dict[int, _Live] = {}
        self._begun = 0
        self._queue = Queue()
        self._deadlines: list[tuple[float, int]] = []
        self._refused: int | None = None  # the job that did not fit; asked again once something has been given back

    @property
    def running(self) -> tuple[int, ...]:
        return tuple(self._running)

    @property
    def waiting(self) -> int:
        return len(self._live) - len(self._running)

    @property
    def begun(self) -> int:
        """Jobs that have said something and have not ended, wherever they stand."""
        return self._begun

    @property
    def busy(self) -> bool:
        return bool(self._live)

    def add(self, job: Job) -> None:
        """ValueError for a job that is not one, or that could never run."""
        if job.id in self._live:
            raise ValueError(f"id: job {job.id} has not ended yet; accepted: an id that is not in use")
        for name in ("prompt", "max_new"):
            if getattr(job, name) < 1:
                raise ValueError(f"{name}: expected at least 1 token, not {getattr(job, name)}")
        if job.horizon > self.config.capacity:
            raise ValueError(
                f"a prompt of {job.prompt} tokens and {job.max_new} new ones are {job.horizon}; "
                f"there is room for {self.config.capacity}"
            )
        aging = self.config.aging
        level = float(job.priority) if aging is None else job.arrival + aging * job.priority
        live = self._live[job.id] = _Live(job, (level, job.arrival, job.id))
        self._queue.push(self._lane(live), live.rank)
        if job.deadline is not None:
            heapq.heappush(self._deadlines, (job.deadline, job.id))

    def cancel(self, id: int) -> None:
        """End a job at once, wherever it stands; nothing happens to one that has ended."""
        if id in self._live:
            self._end(self._live[id])

    def plan(self, now: float) -> Plan:
        """The next step. Empty only when no job is left. RuntimeError: the room does not hold `capacity` tokens."""
        expired = self._expire(now)
        grow: dict[int, int] = {}
        preempted: list[int] = []
        mixes = self.config.mixes
        if mixes:
            self._decode(grow, preempted)
        chunks = self._prefill(grow, admit=not preempted)
        if not chunks and not mixes:
            self._decode(grow, preempted)
        if not grow and self._running:
            chunks = self._force(preempted)
        decodes = tuple(id for id in grow if id not in chunks)
        return Plan(decodes, tuple(chunks.items()), expired, tuple(preempted))

    def ran(self, plan: Plan, said: Mapping[int, bool]) -> None:
        """After the step: who said a token, True where it was the last one (those are closed).

        ValueError when these are not the jobs whose last known token was in the step.
        """
        for id, tokens in [(id, 1) for id in plan.decodes] + list(plan.chunks):
            live = self._running.get(id)
            if live is None:  # cancelled while the step ran
                continue
            live.stored += tokens
            if (live.missing == 0) != (id in said):
                raise ValueError(f"said: job {id} has {live.missing} tokens to read; it says one exactly at 0")
            if id in said:
                self._said(live, last=said[id])

    def _said(self, live: _Live, last: bool) -> None:
        self._begun += not live.said
        live.said += 1
        self._queue.charge(self._lane(live), self.config.reply_weight)
        if last:
            self._end(live)
        elif live.said == live.job.max_new:
            raise ValueError(f"said: job {live.job.id} has said all of its {live.said} tokens; accepted: True")

    def _lane(self, live: _Live) -> str:
        return live.job.tenant if self.config.fairness == "vtc" else ""

    def _end(self, live: _Live) -> None:
        id = live.job.id
        del self._live[id]
        self._begun -= live.said > 0
        if self._running.pop(id, None) is None:
            self._queue.remove(self._lane(live), live.rank)
            if not live.swapped:
                return
        self.room.close(id)
        self._refused = None

    def _expire(self, now: float) -> tuple[int, ...]:
        expired: list[int] = []
        while self._deadlines and self._deadlines[0][0] < now:
            deadline, id = heapq.heappop(self._deadlines)
            live = self._live.get(id)
            if live is not None and live.job.deadline == deadline:
                self._end(live)
                expired.append(id)
        return tuple(expired)

    def _decode(self, grow: dict[int, int], preempted: list[int]) -> None:
        """Give a token to everybody who decodes, and make room for them."""
        grow |= {id: 1 for id, live in self._running.items() if live.decodes}
        while grow and not self.room.fits(grow):
            preempted.append(self._preempt())
            grow.pop(preempted[-1], None)

    def _prefill(self, grow: dict[int, int], admit: bool) -> dict[int, int]:
        """Chunks of prompts, of those who run and then of new ones, in what is left of the budget.

        A chunk without room waits for decodes to end. Who comes back from a swap with its prompt read decodes again.
        """
        left = self._budget() - len(grow)
        chunks: dict[int, int] = {}
        batch = self.config.policy == "static"
        admit = admit and not (batch and self._running)
        for live in sorted((r for r in self._running.values() if not r.decodes), key=lambda r: r.rank):
            tokens = self._chunk(live, left)
            if tokens and self.room.fits({**grow, live.job.id: tokens}):
                chunks[live.job.id] = grow[live.job.id] = tokens
                left -= tokens
        while admit and (batch or left >= (self.config.border or 1)) and (new := self._admit()) is not None:
            if not new.decodes:
                if tokens := self._chunk(new, left):  # it fits: more was asked for when it was let in
                    chunks[new.job.id] = grow[new.job.id] = tokens
                    left -= tokens
            elif self.config.mixes:
                grow[new.job.id] = 1
                left -= 1
        return chunks

    def _budget(self) -> int:
        eager = self.config.policy == "eager" and not self.begun
        return self.config.budget * (EAGER if eager else 1)

    def _chunk(self, live: _Live, left: int) -> int:
        """Tokens that a job reads in this step; 0 where what is left of the budget reaches no border."""
        tokens = min(live.missing, left, self.config.chunk)
        if self.config.border is not None:
            behind = (live.stored + tokens) % self.config.border
            tokens -= behind if tokens < live.missing or behind < tokens else 0
        return max(tokens, 0)

    def _admit(self) -> _Live | None:
        """Start the job that is next, or start it again; None where nobody waits or it does not fit."""
        id = self._queue.first()
        if id is None or id == self._refused or len(self._running) >= self.config.max_running:
            return None
        live = self._live[id]
        if not self._enter(live):
            if not self._running:
                raise RuntimeError(f"the room refuses job {id} of {live.job.horizon} tokens although it is alone")
            self._refused = id
            return None
        self._queue.remove(self._lane(live), live.rank)
        self._running[id] = live
        if not live.charged:
            self._queue.charge(self._lane(live), live.missing)
            live.charged = True
        return live

    def _enter(self, live: _Live) -> bool:
        """Take room for a job, if what is known of all who run fits, and the watermark."""
        id, swapped = live.job.id, live.swapped
        if swapped:
            if not self.room.swap_in(id):
                return False
            live.swapped = False
        else:
            stored = self.room.open(id)
            if stored is None:
                return False
            live.stored = stored
        if self.room.fits({r.job.id: r.ahead(self._watermark) for r in (*self._running.values(), live)}):
            return True
        self._leave(live, swap=swapped)
        return False

    def _leave(self, live: _Live, swap: bool) -> None:
        """Give back the room of a job that waits from now on."""
        live.swapped = swap and live.stored > 0 and self.room.swap_out(live.job.id)
        if not live.swapped:
            self.room.close(live.job.id)

    def _preempt(self) -> int:
        """Send the worst one that runs back to the queue."""
        victim = max(self._running.values(), key=lambda r: r.rank)
        if len(self._running) == 1:
            raise RuntimeError(f"the room has no place for job {victim.job.id} although it is alone")
        del self._running[victim.job.id]
        self._leave(victim, swap=self.config.preempt == "swap")
        self._queue.push(self._lane(victim), victim.rank)
        self._refused = None
        return victim.job.id

    def _force(self, preempted: list[int]) -> dict[int, int]:
        """All who run are in their prompts and none fits: the others make room for the best one."""
        best = min(self._running.values(), key=lambda r: r.rank)
        tokens = self._chunk(best, self.config.budget)
        while not self.room.fits({best.job.id: tokens}):
            preempted.append(self._preempt())
        return {best.job.id: tokens}

"""A server without a model: pages that are counted, and every step checked by what the jobs' lengths imply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from assay.engine.scheduler import Job, Plan, Scheduler, SchedulerConfig


@dataclass(frozen=True)
class Client:
    """A job, and what its client and the model will do: stop after `says` tokens, be cancelled in a step."""

    job: Job
    says: int
    cancel: int | None = None
    cached: int = 0


@dataclass
class Pages:
    """A room of `pages` pages of `page` tokens and so many rows. `held`: tokens of each open job."""

    pages: int
    page: int
    rows: int
    swaps: bool = True
    held: dict[int, int] = field(default_factory=dict)
    out: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)

    def used(self, held: Mapping[int, int]) -> int:
        return sum(-(-tokens // self.page) for tokens in held.values())

    def open(self, job: int) -> int | None:
        assert job not in self.held and job not in self.out
        if len(self.held) == self.rows:
            return None
        free = (self.pages - self.used(self.held)) * self.page
        self.held[job] = min(self.cached.get(job, 0), free)
        return self.held[job]

    def fits(self, grow: Mapping[int, int]) -> bool:
        assert grow.keys() <= self.held.keys()
        return self.used({job: n + grow.get(job, 0) for job, n in self.held.items()}) <= self.pages

    def close(self, job: int) -> None:
        (self.out if job in self.out else self.held).pop(job)

    def swap_out(self, job: int) -> bool:
        if self.swaps:
            self.out[job] = self.held.pop(job)
        return self.swaps

    def swap_in(self, job: int) -> bool:
        if len(self.held) == self.rows or not self.used({**self.held, job: self.out[job]}) <= self.pages:
            return False
        self.held[job] = self.out.pop(job)
        return True

    def write(self, job: int, tokens: int) -> None:
        assert self.fits({job: tokens}), "more tokens than there is memory for"
        self.held[job] += tokens


@dataclass
class Server:
    """Serves clients, one step a second, and checks every plan."""

    room: Pages
    config: SchedulerConfig
    clients: Sequence[Client]
    said: dict[int, int] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    service: dict[str, float] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.room, self.config)
        self.by_id = {client.job.id: client for client in self.clients}
        self.room.cached = {client.job.id: client.cached for client in self.clients}

    def known(self, id: int) -> int:
        return self.by_id[id].job.prompt + self.said[id]

    @property
    def waiting(self) -> set[int]:
        return self.said.keys() - self.ended.keys() - self.room.held.keys()

    @property
    def begun(self) -> set[int]:
        """Who has said something and has not ended."""
        return {id for id, count in self.said.items() if count and id not in self.ended}

    def run(self, steps: int = 20_000) -> Iterator[Plan]:
        """Until all have ended. Yields each step's plan once it has been carried out."""
        now, coming = 0, sorted(self.clients, key=lambda c: c.job.arrival)
        while coming or self.scheduler.busy:
            assert now < steps, "it does not end"
            while coming and coming[0].job.arrival <= now:
                self.scheduler.add(coming[0].job)
                self.said[coming.pop(0).job.id] = 0
            for id in sorted(self.said.keys() - self.ended.keys()):
                if self.by_id[id].cancel == now:
                    self.scheduler.cancel(id)
                    self.ended[id] = "cancelled"
            yield self.step(now)
            assert self.scheduler.begun == len(self.begun)
            now += 1

    def step(self, now: int) -> Plan:
        before, waited = dict(self.room.held), self.waiting
        plan = self.scheduler.plan(now)
        for id in plan.expired:
            assert id not in self.ended and self.by_id[id].job.deadline < now
            self.ended[id] = "expired"
        self.preemptions += len(plan.preempted)
        self.check(plan, before, waited, now)
        for id in self.room.held.keys() - self.entered:
            self.entered.add(id)
            self.serve(id, self.by_id[id].job.prompt - self.room.held[id])
        self.carry_out(plan)
        return plan

    def carry_out(self, plan: Plan) -> None:
        for id, tokens in [*((id, 1) for id in plan.decodes), *plan.chunks]:
            self.room.write(id, tokens)
        saying = [id for id in (*plan.decodes, *dict(plan.chunks)) if self.room.held[id] == self.known(id)]
        for id in saying:
            self.said[id] += 1
            self.serve(id, self.config.reply_weight)
        last = {id: self.said[id] == self.by_id[id].says for id in saying}
        self.scheduler.ran(plan, last)
        for id in (id for id, ends in last.items() if ends):
            assert id not in self.ended and id not in self.room.held
            self.ended[id] = "done"

    def serve(self, id: int, service: float) -> None:
        tenant = self.by_id[id].job.tenant
        self.service[tenant] = self.service.get(tenant, 0.0) + service

    def check(self, plan: Plan, before: Mapping[int, int], waited: set[int], now: int) -> None:
        config, held, chunks = self.config, self.room.held, dict(plan.chunks)
        assert self.scheduler.begun == len(self.begun), "who is in the middle of a reply"
        planned = (*plan.decodes, *chunks)
        assert len(set(planned)) == len(plan.decodes) + len(plan.chunks) and set(planned) <= held.keys()
        assert set(self.scheduler.running) == held.keys() and self.scheduler.waiting == len(self.waiting)
        assert len(held) <= config.max_running and not held.keys() & set(plan.preempted)
        assert planned or not (held or self.waiting), "something could run"
        alone = len(plan.decodes) if config.policy != "chunked" else 0
        assert plan.tokens == len(plan.decodes) + sum(chunks.values()) <= max(self.budget(), alone)
        assert self.room.out.keys() <= self.entered, "moved out before it ran"
        deadlines = (self.by_id[id].job.deadline for id in self.said.keys() - self.ended.keys())
        assert all(deadline is None or deadline >= now for deadline in deadlines)
        assert all(self.said[id] and held[id] == self.known(id) - 1 for id in plan.decodes)
        for id, tokens in chunks.items():
            end = held[id] + tokens
            assert 1 <= tokens <= config.chunk and end <= self.known(id)
            if config.border is not None and end % config.border:  # the end of a prompt, and no border on the way
                assert end == self.known(id) and end // config.border * config.border <= held[id]
        if config.mixes:  # nobody's reply waits for somebody's prompt
            assert set(plan.decodes) == {id for id in held if self.said[id] and held[id] == self.known(id) - 1}
        else:
            assert not (plan.decodes and plan.chunks)
        if config.policy == "static":
            assert not (before.keys() & held.keys() and held.keys() - before.keys()), "a batch was joined"
        if config.fairness == "none":
            self.check_order(plan, before, waited, now)

    def budget(self) -> int:
        """Tokens that this step may have: 4 times as many where nobody is in the middle of a reply."""
        going = self.config.policy != "eager" or bool(self.begun)
        return self.config.budget * (1 if going else 4)

    def urgency(self, id: int, now: int) -> tuple[float, float, int]:
        """The priority less what has been waited, in levels; without rounding when aging is a power of two."""
        job, aging = self.by_id[id].job, self.config.aging
        if aging == 0.0:
            return 0.0, job.arrival, id
        return job.priority - (0.0 if aging is None else (now - job.arrival) / aging), job.arrival, id

    def check_order(self, plan: Plan, before: Mapping[int, int], waited: set[int], now: int) -> None:
        """Who waits still is less urgent than whoever got in, and the first of them has no room."""
        still = sorted(self.waiting, key=lambda id: self.urgency(id, now))
        if not still:
            return
        first = self.urgency(still[0], now)
        assert all(self.urgency(id, now) < first for id in self.room.held if id in waited)
        left = self.budget() - plan.tokens
        if self.config.policy == "static" or plan.preempted or left < (self.config.border or 1):
            return
        if len(self.room.held) < min(self.config.max_running, self.room.rows):
            ahead = self.config.capacity if self.config.reserve == "full" else self.config.watermark
            ids = [*self.room.held, still[0]]
            need = {id: min(self.known(id) + ahead, self.by_id[id].job.horizon) for id in ids}
            assert self.room.used(need) > self.room.pages, f"job {still[0]} had room"

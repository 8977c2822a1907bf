"""One simulated engine: the real scheduler over counters in place of memory, and the time of each step. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from assay.engine.scheduler import Job, Plan, Scheduler, SchedulerConfig
from assay.simulate.cost import Company, Machine, Work, chunk_pairs
from assay.simulate.prefix import PrefixCache, known_tokens


@dataclass
class Task:
    """A request on one replica. given: tokens whose state another replica sent, which are there until it is preempted;
    stored: tokens whose state is here; known: those that it had when it began; made: tokens of its reply."""

    id: int
    prompt: int
    new: int
    blocks: tuple[int, ...] = ()
    given: int = 0
    stored: int = 0
    known: int = 0
    made: int = 0

    @property
    def left(self) -> int:
        """Tokens still to be read or made: what routing counts as load."""
        return max(self.prompt + self.new - 1 - self.stored, 0)


class Counters:
    """The scheduler's Room over counted pages. Cached beginnings of prompts lie beside them and are copied in."""

    def __init__(self, capacity: int | None, page: int, cache: PrefixCache | None) -> None:
        self.pages = None if capacity is None else capacity // page
        self.page, self.cache = page, cache
        self.used = self.moved = 0
        self.tasks: dict[int, Task] = {}
        self.away: set[int] = set()  # swapped out

    def whole(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def open(self, job: int) -> int | None:
        task = self.tasks[job]
        cached = self.cache.match(task.blocks) if self.cache is not None else 0
        found = max(task.given, known_tokens(cached, task.prompt))
        if self.pages is not None and self.used + self.whole(found) > self.pages:
            return None
        self.grow(task, found)
        task.known = found
        return found

    def fits(self, grow: Mapping[int, int]) -> bool:
        if self.pages is None:
            return True
        stored = ((self.tasks[job].stored, n) for job, n in grow.items())
        more = sum(self.whole(have + n) - self.whole(have) for have, n in stored)
        return self.used + more <= self.pages

    def grow(self, task: Task, tokens: int) -> None:
        self.used += self.whole(task.stored + tokens) - self.whole(task.stored)
        task.stored += tokens

    def close(self, job: int) -> None:
        task = self.tasks[job]
        if job in self.away:
            self.away.remove(job)
            task.stored = 0
        else:
            self.grow(task, -task.stored)

    def swap_out(self, job: int) -> bool:
        self.used -= self.whole(self.tasks[job].stored)
        self.moved += self.tasks[job].stored
        self.away.add(job)
        return True

    def swap_in(self, job: int) -> bool:
        more = self.whole(self.tasks[job].stored)
        if self.pages is not None and self.used + more > self.pages:
            return False
        self.used += more
        self.moved += self.tasks[job].stored
        self.away.remove(job)
        return True


class Replica:
    """`start` plans a step and says how long it takes; `end` books it and says who got a token, True: the last."""

    def __init__(self, machine: Machine, config: SchedulerConfig, page: int, cache: PrefixCache | None) -> None:
        self.machine, self.cache = machine, cache
        self.room = Counters(machine.capacity, page, cache)
        self.scheduler = Scheduler(self.room, config)
        self.plan: Plan | None = None
        self.preempted = self.steps = self.asked = self.hits = 0
        self.busy, self.total = 0.0, Work(0, 0, 0, 0.0)
        self.link_free = 0.0
        self.company = Company()

    @property
    def tasks(self) -> dict[int, Task]:
        return self.room.tasks

    @property
    def load(self) -> int:
        return sum(task.left for task in self.tasks.values())

    def refuses(self, task: Task) -> bool:
        """It could never be held, however empty the replica is."""
        pages = self.room.pages
        return pages is not None and self.room.whole(task.prompt + task.new) > pages

    def add(self, task: Task, now: float) -> None:
        self.tasks[task.id] = task
        self.scheduler.add(Job(task.id, task.prompt, task.new, now))

    def start(self, now: float) -> float | None:
        """The step's seconds; None: there is nothing to do, or no room to do it."""
        moved = self.room.moved
        plan = self.scheduler.plan(now)
        self.preempted += len(plan.preempted)
        for job in plan.preempted:
            self.tasks[job].given = 0
        if not plan.decodes and not plan.chunks:
            return None
        self.plan = plan
        work = self._work(plan)
        seconds = self.machine.step.seconds(work) + self.machine.swap(self.room.moved - moved)
        self.total += work
        self.busy += seconds
        self.steps += 1
        return seconds

    def _work(self, plan: Plan) -> Work:
        chunks = [(tokens, self.tasks[job].stored) for job, tokens in plan.chunks]
        context = sum(self.tasks[job].stored for job in plan.decodes) + sum(past for _, past in chunks)
        pairs = sum(chunk_pairs(tokens, past) for tokens, past in chunks)
        prefill, decodes = sum(tokens for tokens, _ in chunks), len(plan.decodes)
        return Work(prefill, decodes, context, pairs, self.company.fresh(prefill, decodes))

    def end(self) -> dict[int, bool]:
        plan = self.plan
        assert plan is not None, "a step ends that has not begun"
        self.plan = None
        for job, tokens in (*plan.chunks, *((job, 1) for job in plan.decodes)):
            self.room.grow(self.tasks[job], tokens)
        read = [self.tasks[job] for job, _ in plan.chunks]
        whole = [task for task in read if task.stored == task.prompt + task.made]
        for task in whole:
            self._read(task)
        said = {}
        for task in (*whole, *(self.tasks[job] for job in plan.decodes)):
            task.made += 1
            said[task.id] = task.made == task.new
        self.scheduler.ran(plan, said)
        for job, last in said.items():
            if last:
                del self.tasks[job]
        return said

    def _read(self, task: Task) -> None:
        """A whole prompt is in: others may begin with it."""
        if self.cache is not None and task.made == 0:
            self.asked, self.hits = self.asked + task.prompt, self.hits + task.known
            self.cache.use(task.blocks)

"""Discrete events: requests arrive, steps end, states arrive at other machines. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from assay.simulate.cost import Machine
from assay.simulate.fleet import Fleet, Router
from assay.simulate.replica import Replica, Task
from assay.simulate.trace import Arrival, Trace


@dataclass
class Served:
    """times: of the reply's tokens. refused: it could never have been held."""

    arrival: Arrival
    times: list[float] = field(default_factory=list)
    refused: bool = False

    @property
    def done(self) -> bool:
        return len(self.times) == self.arrival.new

    @property
    def ttft(self) -> float:
        """To the first token; infinite where there is none."""
        return self.times[0] - self.arrival.at if self.times else float("inf")

    @property
    def latency(self) -> float:
        return self.times[-1] - self.arrival.at if self.done else float("inf")

    @property
    def gaps(self) -> list[float]:
        """Times between two tokens (TBT, also ITL)."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:])]

    @property
    def tpot(self) -> float:
        """Mean time of a token after the first; 0 for a reply of one."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else 0.0


@dataclass(frozen=True)
class Run:
    """end [s]: of the last event. inside: requests in the system, averaged over time. replicas: as they were left."""

    served: tuple[Served, ...]
    end: float
    inside: float
    replicas: tuple[Replica, ...]


Watch = Callable[[Served], bool]


def simulate(trace: Trace, machine: Machine, fleet: Fleet, watch: Watch | None = None) -> Run:
    """Every request of the trace, to its end, or until `watch`, told of each that has ended, answers True.

    ValueError where requests are left that no replica has room for."""
    return Simulation(trace, machine, fleet, watch or (lambda _: False)).run()


class Simulation:
    def __init__(self, trace: Trace, machine: Machine, fleet: Fleet, watch: Watch) -> None:
        self.machine, self.watch = machine, watch
        front, back = fleet.front(machine), fleet.back(machine)
        self.front, self.back, self.split = Router(fleet, front), Router(fleet, back), fleet.split
        self.replicas = (*front, *back)
        self.served = [Served(one) for one in trace]
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.woken: dict[int, Replica] = {}
        self.now = self.area = 0.0
        self.count = self.inside = 0
        self.stopped = False
        for number, one in enumerate(trace):
            self.at(one.at, partial(self.arrive, number))

    def at(self, time: float, action: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, action))

    def run(self) -> Run:
        while self.events and not self.stopped:
            time, _, action = heapq.heappop(self.events)
            self.area += self.inside * (time - self.now)
            self.now = time
            action()
            if not self.events or self.events[0][0] > time:  # a step begins after all that happens at its moment
                self.wake()
        left = sum(not (one.done or one.refused) for one in self.served)
        if left and not self.stopped:
            raise ValueError(
                f"{left} requests were never begun: the scheduler's limits leave no room for them on a replica of "
                f"{self.machine.capacity} tokens"
            )
        return Run(tuple(self.served), self.now, self.area / self.now if self.now else 0.0, self.replicas)

    def wake(self) -> None:
        for replica in self.woken.values():
            seconds = replica.start(self.now) if replica.plan is None else None
            if seconds is not None:
                self.at(self.now + seconds, partial(self.ended, replica))
        self.woken = {}

    def add(self, replica: Replica, task: Task) -> None:
        replica.add(task, self.now)
        self.woken[id(replica)] = replica

    def arrive(self, number: int) -> None:
        served = self.served[number]
        one = served.arrival
        task = Task(number, one.prompt, 1 if self.split else one.new, one.blocks)
        if any(replica.refuses(Task(number, one.prompt, one.new)) for replica in self.replicas):
            served.refused = True
            return
        self.inside += 1
        self.add(self.front.pick(one), task)

    def ended(self, replica: Replica) -> None:
        self.woken[id(replica)] = replica
        for number, last in replica.end().items():
            served = self.served[number]
            served.times.append(self.now)
            if served.done:
                self.inside -= 1
                self.stopped = self.stopped or self.watch(served)
            elif last:
                self.send(replica, number)

    def send(self, replica: Replica, number: int) -> None:
        """Its state goes out after what the same machine is sending already."""
        replica.link_free = max(self.now, replica.link_free) + self.machine.ship(self.served[number].arrival.prompt)
        self.at(replica.link_free, partial(self.received, number))

    def received(self, number: int) -> None:
        """The first token is there, its state is not: it is read as a prompt's last token."""
        one = self.served[number].arrival
        self.add(self.back.pick(one), Task(number, one.prompt + 1, one.new - 1, given=one.prompt))
